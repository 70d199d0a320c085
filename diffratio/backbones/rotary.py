"""FLUX's attention on chosen image queries and keys, with rotary positions that may differ between samples."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from diffratio.backbones.attention import Heads
from diffratio.backbones.joint import attend, attend_nested
from diffratio.errors import DiffratioError
from diffratio.tokens.plan import gather_tokens
from diffratio.tokens.positions import Positions


class RotaryAttention(FluxAttnProcessor):
    """diffusers' `FluxAttnProcessor` with image queries and keys by index, a bias by image key, positions by sample.

    Where nothing is given and all samples share their positions the stock processor does the work, on the attention
    backend that was set; the rest runs on torch's `scaled_dot_product_attention`. Text tokens stand first, and are
    always queries and keys. In a double block they come as a stream of their own; in a single block they are the first
    rows of the input.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        query_index: Tensor | None = None,
        key_index: Tensor | None = None,
        key_bias: Tensor | None = None,
        nested: Tensor | None = None,
        text_tokens: int = 0,
    ) -> Any:
        """Attention output of the chosen image queries and of all text tokens.

        Args:
            attn: the `FluxAttention` module.
            hidden_states: image tokens (B, N, C), in a single block behind the text tokens (B, T + N, C).
            encoder_hidden_states: text tokens (B, T, C) of a double block.
            attention_mask: stock behaviour, not with anything below.
            image_rotary_emb: cos and sin of all text and after them all image tokens, (T + N, D), or by sample
                (B or 1, T + N, D).
            query_index: image tokens that are queries, (B or 1, Q); None takes all.
            key_index: image tokens that are keys and values, (B or 1, M); None takes all.
            key_bias: added to the logits of each chosen image key in float32 (float64 for such input), (B or 1, M).
            nested: the input holds K image tokens and after them L of the same again, and the text twice before them.
                These are the places of the L among the K, (B, L). Either set attends with a text of its own, on
                queries, keys and values that are projected once. Not with an index or a bias.
            text_tokens: text rows of a single block's input, for an index, a bias or nested sets; else 0 will do.

        Returns:
            (B, Q, C) and (B, T, C) of a double block, (B, T + Q, C) of a single one.

        Raises:
            DiffratioError: a mask together with a choice, or nested sets with an index or a bias.
        """
        chosen = not (query_index is None and key_index is None and key_bias is None)
        positions: Positions = () if image_rotary_emb is None else tuple(image_rotary_emb)
        if not chosen and nested is None and all(one.ndim == 2 for one in positions):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # type: ignore[arg-type]
        if attention_mask is not None:
            raise DiffratioError("rotary joint attention on chosen tokens takes no attention_mask")
        if nested is not None and chosen:
            raise DiffratioError("nested sets of tokens attend without index, bias and mask")
        text, image = encoder_hidden_states, hidden_states
        if text is None:
            text, image = hidden_states[:, :text_tokens], hidden_states[:, text_tokens:]
        positions = tuple(one if one.ndim == 3 else one[None] for one in positions)
        if nested is not None:
            text = text[:, : text.shape[1] // 2]  # equal in both halves up to here
            image = image[:, : image.shape[1] - nested.shape[1]]
        heads = _heads(attn, text, image, positions, query_index, key_index)
        if nested is None:
            return _outputs(attn, *attend(*heads, key_bias, text_first=True))
        return _outputs(attn, *attend_nested(*heads, nested, text_first=True))


def _heads(
    attn: Any, text: Tensor, image: Tensor, positions: Positions, query_index: Tensor | None, key_index: Tensor | None
) -> tuple[Heads, Heads | None]:
    """Queries, keys and values by head of image and text tokens, normed and turned; no text gives None."""
    count = text.shape[1]
    queries, query_positions = _chosen(image, positions, query_index, count)
    keys, key_positions = _chosen(image, positions, key_index, count)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attn.head_dim))  # (B, tokens, heads, head_dim)

    if attn.added_kv_proj_dim is None:
        q_rows, k_rows = _behind(text, queries), _behind(text, keys)
        q, k, v = by_head(attn.to_q(q_rows)), by_head(attn.to_k(k_rows)), by_head(attn.to_v(k_rows))
        q, k = attn.norm_q(q), attn.norm_k(k)
    else:
        q = torch.cat(
            [attn.norm_added_q(by_head(attn.add_q_proj(text))), attn.norm_q(by_head(attn.to_q(queries)))], dim=1
        )
        k = torch.cat([attn.norm_added_k(by_head(attn.add_k_proj(text))), attn.norm_k(by_head(attn.to_k(keys)))], dim=1)
        v = torch.cat([by_head(attn.add_v_proj(text)), by_head(attn.to_v(keys))], dim=1)
    rows = tuple(x.transpose(1, 2) for x in (turned(q, query_positions), turned(k, key_positions), v))
    q, k, v = (x[:, :, count:] for x in rows)
    if count == 0:
        return (q, k, v), None
    text_q, text_k, text_v = (x[:, :, :count] for x in rows)
    return (q, k, v), (text_q, text_k, text_v)


def _chosen(image: Tensor, positions: Positions, index: Tensor | None, text: int) -> tuple[Tensor, Positions]:
    """Image tokens at an index, and the positions of all text tokens and of those."""
    if index is None:  # nested sets leave positions of the second set behind
        return image, tuple(one[:, : text + image.shape[1]] for one in positions)
    moved = []
    for one in positions:
        taken = gather_tokens(one[:, text:], index)
        moved.append(torch.cat([one[:, :text].expand(len(taken), -1, -1), taken], dim=1))
    return gather_tokens(image, index), tuple(moved)


def _behind(text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text, image], dim=1) if text.shape[1] else image


def turned(x: Tensor, positions: Positions) -> Tensor:
    """Pairs of channels turned by a token's angles.

    Args:
        x: queries or keys (B, tokens, heads, D).
        positions: cos and sin (B or 1, tokens, D), each angle twice; nothing turns nothing.

    Returns:
        As x; computed in float32, or float64 for such x.
    """
    if not positions:
        return x
    cos, sin = (one[:, :, None].to(x.device) for one in positions)
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    quarter = torch.stack([-second, first], dim=-1).flatten(-2)  # each pair turned by 90 degrees
    return (x.to(wide) * cos + quarter * sin).to(x.dtype)


def _outputs(attn: Any, image: Tensor, text: Tensor | None) -> Any:
    """Output projections of a double block; a single block projects elsewhere, text and image behind it as one."""

    def joined(y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    if attn.pre_only:
        return joined(image if text is None else torch.cat([text, image], dim=2))
    assert text is not None
    return attn.to_out[1](attn.to_out[0](joined(image))), attn.to_add_out(joined(text))
