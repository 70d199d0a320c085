"""Joint attention of image and text tokens on chosen image queries and keys: the arithmetic, and SD3's processor."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional

from diffratio.backbones.attention import Heads, biased_attention, gather_heads, projected, projected_out
from diffratio.errors import DiffratioError
from diffratio.tokens.plan import gather_tokens


def attend(
    image: Heads, text: Heads | None, key_bias: Tensor | None = None, text_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of image and text queries to image and text keys.

    Args:
        image: by head, Q queries and M keys and values.
        text: by head, T of each; None attends among the image tokens alone.
        key_bias: added to the logits of each image key, (B or 1, M); text keys have none.
        text_first: which stream comes first in the family's own processor, whose result is then met bit for bit.

    Returns:
        Results by head of the image (B, heads, Q, head_dim) and text tokens (B, heads, T, head_dim).
    """
    if text is None:
        return _attend(image, key_bias), None
    pairs = zip(text, image, strict=True) if text_first else zip(image, text, strict=True)
    q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
    sizes, count = [image[0].shape[2], text[0].shape[2]], text[1].shape[2]
    if key_bias is not None:
        key_bias = functional.pad(key_bias, (count, 0) if text_first else (0, count))
    parts = _attend((q, k, v), key_bias).split(sizes[::-1] if text_first else sizes, dim=2)
    return (parts[1], parts[0]) if text_first else (parts[0], parts[1])


def attend_nested(
    image: Heads, text: Heads | None, nested: Tensor, text_first: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of a set of image tokens with all of the text, and of a nested set with all of the text.

    Args:
        image: by head, of K tokens.
        text: by head, of T tokens; None attends among the image tokens alone.
        nested: the nested set's places among the K, (B, L).
        text_first: as in `attend`.

    Returns:
        Results by head of the K and after them of the L tokens, (B, heads, K + L, head_dim), and of the text tokens
        with either set, (B, heads, 2 T, head_dim).
    """
    upper, upper_text = attend(image, text, text_first=text_first)
    lower, lower_text = attend(gather_heads(image, nested), text, text_first=text_first)
    both = torch.cat([upper, lower], dim=2)
    if upper_text is None or lower_text is None:
        return both, None
    return both, torch.cat([upper_text, lower_text], dim=2)


def _attend(heads: Heads, key_bias: Tensor | None) -> Tensor:
    if key_bias is not None:
        return biased_attention(*heads, key_bias)
    return functional.scaled_dot_product_attention(*heads)


class JointAttention:
    """diffusers' `JointAttnProcessor2_0` with image queries and keys by index, and a bias by image key.

    Where nothing is given the stock processor does the work. Text tokens are always queries and keys. Without text it
    is self-attention of the image tokens (the second attention of SD3.5).
    """

    def __init__(self) -> None:
        self.stock = JointAttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_index: Tensor | None = None,
        key_index: Tensor | None = None,
        key_bias: Tensor | None = None,
        nested: Tensor | None = None,
    ) -> Any:
        """Attention output of the chosen image queries and of all text tokens.

        Args:
            attn: the `Attention` module.
            hidden_states: image tokens (B, N, C).
            encoder_hidden_states: text tokens (B, T, C), or None.
            attention_mask: refused; the stock processor would ignore it.
            query_index: image tokens that are queries, (B or 1, Q); None takes all.
            key_index: image tokens that are keys and values, (B or 1, M); None takes all.
            key_bias: added to the logits of each chosen image key in float32 (float64 for such input), (B or 1, M).
            nested: the input holds K image tokens and after them L of the same again, and the text twice. These are
                the places of the L among the K, (B, L). Either set attends with a text of its own, on queries, keys and
                values that are projected once. Not with an index or a bias.

        Returns:
            (B, Q, C), and with text (B, T, C) beside it.

        Raises:
            DiffratioError: a mask, or nested sets with an index or a bias.
        """
        if attention_mask is not None:
            raise DiffratioError("joint attention takes no attention_mask: diffusers' own processor would ignore it")
        if nested is not None:
            if not (query_index is None and key_index is None and key_bias is None):
                raise DiffratioError("nested sets of tokens attend without index, bias and mask")
            return self._nested(attn, hidden_states, encoder_hidden_states, nested)
        if query_index is None and key_index is None and key_bias is None:
            return self.stock(attn, hidden_states, encoder_hidden_states)  # type: ignore[arg-type]
        queries = hidden_states if query_index is None else gather_tokens(hidden_states, query_index)
        keys = hidden_states if key_index is None else gather_tokens(hidden_states, key_index)
        text = None if encoder_hidden_states is None else _text_heads(attn, encoder_hidden_states)
        return _outputs(attn, *attend(projected(attn, queries, keys), text, key_bias))

    def _nested(self, attn: Any, x: Tensor, both_texts: Tensor | None, nested: Tensor) -> Any:
        upper = x[:, : x.shape[1] - nested.shape[1]]
        text = None
        if both_texts is not None:  # equal in both halves up to here
            text = _text_heads(attn, both_texts[:, : both_texts.shape[1] // 2])
        return _outputs(attn, *attend_nested(projected(attn, upper, upper), text, nested))


def _text_heads(attn: Any, text: Tensor) -> Heads:
    """Queries, keys and values of the text tokens by head, normed where the module does."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = heads(attn.add_q_proj(text)), heads(attn.add_k_proj(text)), heads(attn.add_v_proj(text))
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    return q, k if attn.norm_added_k is None else attn.norm_added_k(k), v


def _outputs(attn: Any, image: Tensor, text: Tensor | None) -> Any:
    """The output projections; the block that gives no text has none for it."""
    if text is None:
        return projected_out(attn, image)
    joined = text.transpose(1, 2).flatten(2)
    return projected_out(attn, image), joined if attn.context_pre_only else attn.to_add_out(joined)
