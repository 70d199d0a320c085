"""What a block gives: image tokens alone, or image and text tokens where the family has a stream of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffratio.routing.router import straight_through


@dataclass(frozen=True)
class Joint:
    """Tokens of a block with two streams.

    Args:
        image: (B, K, C), whatever of them is computed.
        text: (B, T, C), always all; None where the block gives no text (the last one of SD3).
    """

    image: Tensor
    text: Tensor | None


Result = Tensor | Joint


def image_of(result: Result) -> Tensor:
    """The image tokens (B, K, C)."""
    return result.image if isinstance(result, Joint) else result


def text_of(result: Result) -> Tensor | None:
    """The text tokens (B, T, C), where there are some."""
    return result.text if isinstance(result, Joint) else None


def with_image(result: Result, image: Tensor) -> Result:
    """The same text beside other image tokens."""
    return replace(result, image=image) if isinstance(result, Joint) else image


def gated(x: Tensor, result: Result, logits: Tensor) -> Result:
    """The straight-through gate on the image tokens of a result; text is never gated."""
    return with_image(result, straight_through(x, image_of(result), logits))


def mixed(lower: Result, upper: Result, weight: Tensor) -> Result:
    """(1 - w) lower + w upper, the same w in both streams.

    Args:
        lower: of one pass.
        upper: of the other, with as many image tokens.
        weight: w of each sample (B,).

    Returns:
        In the wider type of the two.
    """

    def between(a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return torch.lerp(a.to(dtype), b.to(dtype), weight[:, None, None].to(dtype))

    image = between(image_of(lower), image_of(upper))
    text, other = text_of(upper), text_of(lower)
    if text is not None and other is not None:
        text = between(other, text)
    return Joint(image, text) if isinstance(upper, Joint) else image


def joined(results: Sequence[Result], order: Sequence[int] | None = None) -> Result:
    """The results of parts of a batch as one.

    Args:
        results: of (b, N, C) each.
        order: sample of the batch that each row of them belongs to; None where they are in order.

    Returns:
        (B, N, C), in the widest type of them: under autocast a part that computes nothing differs.
    """
    image = _stacked([image_of(result) for result in results], order)
    if not any(isinstance(result, Joint) for result in results):
        return image
    return Joint(image, joined_text(results, order))


def joined_text(results: Sequence[Result], order: Sequence[int] | None = None) -> Tensor | None:
    """The text alone, as `joined`; None as soon as one part has none: the stream ends there."""
    texts = [text for result in results if (text := text_of(result)) is not None]
    return _stacked(texts, order) if len(texts) == len(results) else None


def _stacked(parts: Sequence[Tensor], order: Sequence[int] | None) -> Tensor:
    dtype = max((part.dtype for part in parts), key=lambda one: one.itemsize)
    whole = torch.cat([part.to(dtype) for part in parts])
    if order is None or list(order) == sorted(order):
        return whole
    return whole.index_select(0, torch.tensor(order, device=whole.device).argsort())
