"""Which tokens are alike: destinations by cell, bipartite matching, seeded draws."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.plan import MergePlan

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def mixed_seed(*keys: int) -> int:
    """One 63-bit seed from several integers (splitmix64 finaliser), the same on every machine."""
    state = 0
    for key in keys:
        state = (state + (key & _MASK) + _MIX[0]) & _MASK
        state = ((state ^ (state >> 30)) * _MIX[1]) & _MASK
        state = ((state ^ (state >> 27)) * _MIX[2]) & _MASK
        state ^= state >> 31
    return state >> 1


def seeded_uniform(shape: tuple[int, ...], *keys: int) -> Tensor:
    """Uniform draws in [0, 1) that depend on the keys alone; on the CPU, so that every device gets the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(mixed_seed(*keys)))


def cell_destinations(grid: TokenGrid, cell: int, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """Splits the tokens into one destination a whole cell and sources (the rest, odd edges included).

    Args:
        grid: token grid.
        cell: side of a cell.
        draws: uniform draws (N,), of which each cell uses the one at its top-left token; None takes the top-left token.

    Returns:
        sources (N_src,) and destinations (N_dst,), token indices in raster order.
    """
    rows, columns = grid.height // cell, grid.width // cell
    corners = (torch.arange(rows)[:, None] * cell * grid.width + torch.arange(columns)[None, :] * cell).reshape(
        -1
    )  # (cells,)
    if draws is None:
        destinations = corners
    else:
        pick = (draws[corners] * cell * cell).long().clamp_(max=cell * cell - 1)
        destinations = (corners + pick // cell * grid.width + pick % cell).sort().values
    is_source = torch.ones(grid.tokens, dtype=torch.bool)
    is_source[destinations] = False
    return is_source.nonzero()[:, 0], destinations


def strided_tokens(grid: TokenGrid, stride: int) -> Tensor:
    """Tokens at rows and columns 0, s, 2s, ...: one a cell, cut cells at the edges included -> (M,), raster order."""
    return torch.arange(grid.tokens).view(grid.height, grid.width)[::stride, ::stride].reshape(-1)


def bipartite_merge(metric: Tensor, sources: Tensor, destinations: Tensor, removed: int) -> MergePlan:
    """Merges the `removed` sources that are most similar to some destination into it.

    Args:
        metric: (B, N, C); tokens are compared by cosine.
        sources: (N_src,) token indices.
        destinations: (N_dst,) token indices.
        removed: number of sources that are merged, at most N_src.

    Returns:
        A plan with K = N - removed.

    Source: ToMe for diffusion (arXiv 2303.17604), section 3; only the values are followed.
    """
    batch, tokens, _ = metric.shape
    sources, destinations = sources.to(metric.device), destinations.to(metric.device)
    unit = functional.normalize(metric.detach().float(), dim=-1)
    with torch.autocast(metric.device.type, enabled=False):  # in half precision ties would make the choice arbitrary
        scores = unit[:, sources] @ unit[:, destinations].transpose(1, 2)  # (B, N_src, N_dst)
    best, partner = scores.max(dim=-1)
    merged = best.argsort(dim=-1, descending=True, stable=True)[:, :removed]  # (B, removed), positions in `sources`
    merged_tokens = sources[merged]
    keep = torch.ones(batch, tokens, dtype=torch.bool, device=metric.device).scatter_(1, merged_tokens, False)
    slots = keep.long().cumsum(1) - 1
    target = destinations[partner.gather(1, merged)]
    slots = slots.scatter(1, merged_tokens, slots.gather(1, target))
    # a stable sort puts the kept tokens first, in raster order, without a data-dependent shape
    index = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : tokens - removed]
    return MergePlan(index=index, slots=slots)
