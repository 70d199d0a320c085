"""Attention on chosen queries and keys: a processor around the stock one of diffusers' `Attention` module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from diffratio.errors import DiffratioError
from diffratio.tokens.plan import gather_tokens

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values by head, (B, heads, tokens, head_dim) each


class IndexedAttention:
    """diffusers' `AttnProcessor2_0` with queries and keys by index, and a bias by key.

    Without a bias the stock processor does the work on the chosen tokens, so it equals it bit for bit where nothing
    is given. For self-attention of three-dimensional input (DiT, PixArt).
    """

    def __init__(self) -> None:
        self.stock = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        query_index: Tensor | None = None,
        key_index: Tensor | None = None,
        key_bias: Tensor | None = None,
        nested: Tensor | None = None,
    ) -> Tensor:
        """Attention output of the chosen queries.

        Args:
            attn: the `Attention` module.
            hidden_states: tokens (B, N, C).
            encoder_hidden_states: other tokens to take keys and values from; stock behaviour, not with an index.
            attention_mask: stock behaviour, not with an index or a bias.
            temb: stock behaviour.
            query_index: tokens that are queries, (B or 1, Q); None takes all.
            key_index: tokens that are keys and values, (B or 1, M); None takes all.
            key_bias: added to the logits of each chosen key in float32 (float64 for such input), (B or 1, M).
            nested: the input holds K tokens and after them L of the same again, and these are their places among the
                K, (B, L). Both sets attend each to itself, on queries, keys and values that are projected once. Not
                with an index or a bias.

        Returns:
            (B, Q, C).
        """
        if nested is not None:
            if not (query_index is None and key_index is None and key_bias is None and attention_mask is None):
                raise DiffratioError("nested sets of tokens attend without index, bias and mask")
            return _nested(attn, hidden_states, nested)
        if query_index is None and key_index is None and key_bias is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is not None or attention_mask is not None:
            raise DiffratioError("queries and keys by index are for self-attention without a mask")
        queries = hidden_states if query_index is None else gather_tokens(hidden_states, query_index)
        keys = hidden_states if key_index is None else gather_tokens(hidden_states, key_index)
        if key_bias is None:
            return self.stock(attn, queries, keys, None, temb)
        return _biased(attn, queries, keys, key_bias)


class TextAttention:
    """diffusers' `AttnProcessor2_0` for cross-attention of a block whose self-attention has `IndexedAttention`.

    It is handed the same arguments. Every image token attends to the text on its own, so neither the weight that image
    tokens have as keys nor which of them attend to each other matters here.
    """

    def __init__(self) -> None:
        self.stock = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        query_index: Tensor | None = None,
        key_index: Tensor | None = None,
        key_bias: Tensor | None = None,
        nested: Tensor | None = None,
    ) -> Tensor:
        """Attention output of all queries.

        Args:
            attn: the `Attention` module.
            hidden_states: image tokens (B, N, C).
            encoder_hidden_states: text tokens (B, T, C).
            attention_mask: stock behaviour.
            temb: stock behaviour.
            query_index: refused; the queries are what came.
            key_index: refused; the keys are the text.
            key_bias: of the image tokens as keys; no image token is one here.
            nested: of the image tokens among each other; both sets attend to the text alike.

        Returns:
            (B, N, C).

        Raises:
            DiffratioError: an index, or no text.
        """
        if query_index is not None or key_index is not None:
            raise DiffratioError("queries and keys by index are for self-attention, not for attention to text")
        if encoder_hidden_states is None:
            raise DiffratioError("attention to text got no encoder_hidden_states; give the prompt's embeddings")
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def _biased(attn: Any, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Attention of (B, Q, C) to (B, M, C) with the logits of every key raised by its bias (B or 1, M)."""
    return projected_out(attn, biased_attention(*projected(attn, queries, keys), bias))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of queries and keys by head with the logits of every key raised by its bias.

    Args:
        q: (B, heads, Q, head_dim).
        k: (B, heads, M, head_dim).
        v: (B, heads, M, head_dim).
        bias: (B or 1, M), float32, or float64 for such tokens; may get gradient.

    Returns:
        (B, heads, Q, head_dim).
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms of queries and keys return float32
    if bias.requires_grad and torch.is_grad_enabled():
        return _learning_bias(q, k, v, bias)
    wide = torch.promote_types(q.dtype, torch.float32)
    # the fused kernel takes a bias of the queries' type alone: half precision would round log-weights to three digits
    with torch.autocast(q.device.type, enabled=False):
        mask = bias.to(wide)[:, None, None, :].expand(-1, 1, q.shape[2], -1)
        y = functional.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), attn_mask=mask)
    return y.to(q.dtype)


def _learning_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention by head with a bias that gets gradient: fused kernels have none for a mask, so it is one more channel.

    Queries hold 1 there and keys the bias. In half precision a second channel holds what rounding the first one lost.
    """
    scale = q.shape[-1] ** -0.5
    rest = (bias / scale)[:, None, :, None].expand(k.shape[0], k.shape[1], -1, -1)  # (B, heads, M, 1)
    channels = [rest.to(k.dtype)]
    if k.dtype.itemsize < 4:
        channels.append((rest - channels[0]).to(k.dtype))
    more, head_dim = len(channels), q.shape[-1]
    q, k = torch.cat([q, q.new_ones(*q.shape[:-1], more)], -1), torch.cat([k, *channels], -1)
    y = functional.scaled_dot_product_attention(q, k, functional.pad(v, (0, more)), scale=scale)
    return y[..., :head_dim]


def _nested(attn: Any, x: Tensor, nested: Tensor) -> Tensor:
    """Attention in (B, K + L, C) of the first K tokens among themselves, and of the last L among themselves."""
    large = x.shape[1] - nested.shape[1]
    heads = projected(attn, x[:, :large], x[:, :large])  # (B, heads, K, head_dim)
    of_large = functional.scaled_dot_product_attention(*heads)
    of_nested = functional.scaled_dot_product_attention(*gather_heads(heads, nested))
    return projected_out(attn, torch.cat([of_large, of_nested], dim=2))


def gather_heads(heads: Heads, index: Tensor) -> Heads:
    """Queries, keys and values of the tokens at index (B or 1, K): normed or turned, they are per token too."""
    q, k, v = (gather_tokens(one.transpose(1, 2), index).transpose(1, 2) for one in heads)
    return q, k, v


def projected(attn: Any, queries: Tensor, keys: Tensor) -> Heads:
    """Queries, keys and values by head, (B, heads, tokens, head_dim), normed where the module does."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = heads(attn.to_q(queries)), heads(attn.to_k(keys)), heads(attn.to_v(keys))
    return q if attn.norm_q is None else attn.norm_q(q), k if attn.norm_k is None else attn.norm_k(k), v


def projected_out(attn: Any, y: Tensor) -> Tensor:
    """The output projection of (B, heads, tokens, head_dim) -> (B, tokens, C)."""
    y = y.transpose(1, 2).flatten(2)
    y = attn.to_out[1](attn.to_out[0](y)) / attn.rescale_output_factor
    assert isinstance(y, Tensor)
    return y


def attention_modules(blocks: Iterable[nn.Module], path: str) -> list[Any]:
    """The attention module of every block, by its path inside the block."""
    return [block.get_submodule(path) for block in blocks]


def index_attention_(
    modules: Sequence[Any], processor: Callable[[], Any] = IndexedAttention, stock: type = AttnProcessor2_0
) -> list[Any]:
    """Replaces the processors of attention modules by our own.

    Args:
        modules: diffusers' `Attention` modules.
        processor: makes one of ours.
        stock: the class of diffusers' processor that ours stands for.

    Returns:
        The processors that were there, for `plain_attention_`.

    Raises:
        DiffratioError: one of them is not diffusers' stock processor, or the module does what ours cannot.
    """
    for module in modules:
        if type(module.processor) is not stock:
            raise DiffratioError(
                f"the attention processor is {type(module.processor).__name__}, and choosing queries and keys "
                f"stands for {stock.__name__} alone: call set_processor({stock.__name__}()) of each attention module"
            )
        if any(getattr(module, name, None) for name in ("residual_connection", "group_norm", "spatial_norm")):
            raise DiffratioError("attention with a residual, group or spatial norm of its own cannot choose its keys")
        if getattr(module, "fused_projections", False):
            raise DiffratioError("fused projections cannot choose keys: call unfuse_qkv_projections() first")
    found = [module.processor for module in modules]
    for module in modules:
        module.processor = processor()
    return found


def plain_attention_(modules: Sequence[Any], processors: Sequence[Any]) -> None:
    """Puts processors back."""
    for module, processor in zip(modules, processors, strict=True):
        module.processor = processor
