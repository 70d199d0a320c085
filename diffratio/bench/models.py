"""Models of the benches: one set of weights, many ways to run it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffratio import surgery
from diffratio.backbones import backbone_of, get_backbone
from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.surgery import shared_copy as shared_copy


def wide_dit(width: int, depth: int, tokens: int, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A DiT of random weights on a square grid of 2x2 patches of 4 latent channels, in evaluation mode.

    Args:
        width: channels d; DiT-XL has 1152 in 16 heads of 72.
        depth: blocks.
        tokens: N, a square.
        device: where.
        dtype: of the weights.
        seed: of the weights.
    """
    head = 72 if width % 72 == 0 else math.gcd(width, 64)
    torch.manual_seed(seed)
    transformer = get_backbone("dit").from_config(
        {
            "num_attention_heads": width // head,
            "attention_head_dim": head,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": depth,
            "sample_size": 2 * math.isqrt(tokens),
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        }
    )
    transformer = transformer.to(device).eval()
    return transformer if dtype == torch.float32 else transformer.to(dtype)


def compile_blocks_(transformer: Any, backend: str = "inductor") -> Any:
    """Compiles blocks, each kind of model in the way that serves it best.

    Converted ones by `surgery.compile_`, one graph for all numbers of tokens; others for the one shape that they see.

    Args:
        transformer: converted or not; changed in place.
        backend: of `torch.compile`.
    """
    if surgery.is_applied(transformer):
        return surgery.compile_(transformer, backend=backend)
    for block in backbone_of(transformer).blocks(transformer):
        block.compile(dynamic=False, backend=backend)
    return transformer


class _Cut(nn.Module):
    """Stands before the first block: only the first k tokens go on."""

    def __init__(self, kept: int, norm1: nn.Module) -> None:
        super().__init__()
        self.kept, self.norm1 = kept, norm1  # DiT's output modulation reaches into norm1 of its first block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states[:, : self.kept].contiguous()  # (B, K, C)


class _Pad(nn.Module):
    """Stands behind the last block: the missing tokens are zeros."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return nn.functional.pad(hidden_states, (0, 0, 0, self.tokens - hidden_states.shape[1]))  # (B, N, C)


def shortened(transformer: Any, kept: int, compiled: bool = False) -> Any:
    """A dense DiT whose blocks see k of the tokens, whatever they are: what routing could cost at best.

    Args:
        transformer: a dense DiT; untouched.
        kept: k.
        compiled: compiles the blocks, for exactly k tokens.
    """
    short = shared_copy(transformer)
    if compiled:
        compile_blocks_(short)
    backbone = backbone_of(short)
    blocks: list[Any] = list(backbone.blocks(short))
    tokens = backbone.grid(short).tokens
    short.transformer_blocks = nn.ModuleList([_Cut(kept, blocks[0].norm1), *blocks, _Pad(tokens)])
    return short


def counted_macs(
    transformer: Any, description: Description, run: SamplingRun, samples: int, call: Callable[[], object]
) -> float:
    """MACs of a call as a fraction of the dense run, counted from the tokens that really enter each DiT sub-layer.

    It sees what caches skip and what merging leaves out, whoever wrote them; the work of planning it does not see.

    Args:
        transformer: a DiT with anything attached.
        description: its costs.
        run: the dense run that `call` stands for.
        samples: how many samples the call makes.
        call: one sampling run.
    """
    total, queries, handles = 0, 0, []

    def watch(module: Any, cost: Callable[[int], int]) -> None:
        """Adds rows x cost(tokens) at every call."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal total
            x = args[0] if args else next(iter(kwargs.values()))  # (rows, tokens, C)
            total += x.shape[0] * cost(x.shape[1])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def queried(tokens: int) -> int:
        nonlocal queries
        queries = tokens
        return 0

    # found by what they hold, since a peer may have put the blocks elsewhere
    blocks = [module for module in transformer.modules() if hasattr(module, "attn1") and hasattr(module, "ff")]
    for block, cost in zip(blocks, description.blocks, strict=True):
        sites = {site.name: site for site in cost.sites}
        watch(block.norm1, partial(_fixed, cost.fixed))
        watch(block.attn1.to_q, queried)
        watch(block.attn1.to_k, lambda keys, site=sites["self_attention"]: site.macs(queries, keys, 0))  # type: ignore[misc]
        watch(block.ff.net[-1], lambda tokens, site=sites["feed_forward"]: site.macs(tokens, tokens, 0))  # type: ignore[misc]
    watch(transformer.proj_out_2, description.outer)
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return total / (samples * description.dense(run))


def _fixed(macs: int, tokens: int) -> int:
    return macs
