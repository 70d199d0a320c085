"""More input channels for a pretrained transformer, with the same output to begin with."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from diffratio.backbones.base import backbone_of
from diffratio.errors import DiffratioError

M = TypeVar("M", bound=nn.Module)


def image_channels(transformer: nn.Module) -> int:
    """Channels C of the pictures, or latents, that a transformer makes.

    An inpainting model sees 2 C + 1 channels (noised picture, masked picture, mask) and predicts C, or 2 C with learned
    variance; others predict what they see.
    """
    config: Any = transformer.config
    folded = backbone_of(transformer).fold ** 2
    inputs = int(config.in_channels) // folded
    outputs, half = _outputs(transformer) // folded, (inputs - 1) // 2
    return half if inputs % 2 and half and outputs in (half, 2 * half) else inputs


def inpaints(transformer: nn.Module) -> bool:
    """Whether a transformer sees a masked picture and its mask beside the noised picture."""
    config: Any = transformer.config
    return image_channels(transformer) * backbone_of(transformer).fold ** 2 != config.in_channels


def widen_(transformer: M, in_channels: int) -> M:
    """Gives the patch embedding further input channels, with weights of zero: the output stays the same, bit for bit.

    Args:
        transformer: dense or converted; its predictions keep their channels.
        in_channels: how many it sees afterwards; 2 C + 1 makes an inpainting model of one of C channels.

    Returns:
        The transformer.

    Raises:
        DiffratioError: it sees more channels than it makes already, the number is no higher than now, or the family's
            patch embedding is no convolution.
    """
    config: Any = transformer.config
    embedding = backbone_of(transformer).patch_embedding(transformer)
    if inpaints(transformer):
        raise DiffratioError(
            f"the transformer is widened already: it sees {config.in_channels} channels for pictures of "
            f"{image_channels(transformer)}; widen the one that it was made from, or train this one as it is"
        )
    if in_channels <= config.in_channels:
        raise DiffratioError(f"in_channels={in_channels} must be more than the {config.in_channels} that there are now")
    old = embedding.weight
    weight = torch.zeros(old.shape[0], in_channels, *old.shape[2:], device=old.device, dtype=old.dtype)
    with torch.no_grad():
        weight[:, : old.shape[1]] = old
    embedding.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    embedding.in_channels = in_channels
    if "in_channels" in vars(transformer):  # DiT keeps a copy
        vars(transformer)["in_channels"] = in_channels
    transformer.register_to_config(in_channels=in_channels, out_channels=_outputs(transformer))  # type: ignore[operator]
    return transformer


def _outputs(transformer: nn.Module) -> int:
    config: Any = transformer.config
    return int(getattr(config, "out_channels", None) or config.in_channels)
