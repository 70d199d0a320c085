"""Which tokens are alike: destinations by cell, window scores, bipartite matching, seeded draws."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.plan import MergePlan, gather_tokens

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


def seeded_normal(shape: tuple[int, ...], *keys: int) -> Tensor:
    """Standard normal draws that depend on the keys alone; on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed_seed(*keys)))


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


def cell_members(grid: TokenGrid, cell: int) -> Tensor:
    """Tokens of each whole cell, (cells, cell^2), cells and members in raster order; odd edges belong to none."""
    rows, columns = grid.height // cell, grid.width // cell
    tokens = torch.arange(grid.tokens).view(grid.height, grid.width)[: rows * cell, : columns * cell]
    return tokens.reshape(rows, cell, columns, cell).transpose(1, 2).reshape(rows * columns, cell**2)


def window_similarity(metric: Tensor, grid: TokenGrid, side: int, self_pairs: bool = False) -> Tensor:
    """How alike the tokens of each whole window are, as the mean cosine of its pairs.

    The mean over all pairs is |mean of the unit vectors|^2, so no pair is ever formed: O(N C).

    Args:
        metric: (B, N, C).
        grid: token grid.
        side: side m of a window.
        self_pairs: whether a token's pair with itself (cosine 1) is among them.

    Returns:
        (B, windows) in [-1 / (m^2 - 1), 1]; higher is more alike.
    """
    unit = functional.normalize(metric.detach().float(), dim=-1)
    members = cell_members(grid, side).to(metric.device)  # (W, m^2)
    whole = unit[:, members].mean(dim=2).square().sum(-1)  # (B, W)
    size = side**2
    return whole if self_pairs else (size * whole - 1) / (size - 1)


def similar_partners(metric: Tensor, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Each source's most similar destination, by cosine.

    Args:
        metric: (B, N, C).
        sources: token indices (N_src,), or (B, N_src).
        destinations: token indices (N_dst,), or (B, N_dst).

    Returns:
        cosine with the partner (B, N_src), and the partner's position among the destinations (B, N_src).
    """
    unit = functional.normalize(metric.detach().float(), dim=-1)
    left = gather_tokens(unit, sources.view(-1, sources.shape[-1]))
    right = gather_tokens(unit, destinations.view(-1, destinations.shape[-1]))
    with torch.autocast(metric.device.type, enabled=False):  # in half precision ties would make the choice arbitrary
        best, partner = (left @ right.transpose(1, 2)).max(dim=-1)  # over (B, N_src, N_dst)
    return best, partner


def nearest_partners(grid: TokenGrid, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Each source's nearest destination on the grid; the first of several equally near ones in raster order.

    Args:
        grid: token grid.
        sources: token indices (B, N_src).
        destinations: token indices in raster order (B, N_dst).

    Returns:
        minus the squared distance (B, N_src), and the partner's position among the destinations (B, N_src).
    """

    def places(index: Tensor) -> Tensor:
        return torch.stack([index // grid.width, index % grid.width], dim=-1).float()  # (B, n, 2)

    left, right = places(sources), places(destinations)
    with torch.autocast(sources.device.type, enabled=False):
        product = left @ right.transpose(1, 2)  # exact: whole numbers far below 2^24
    squared = left.square().sum(-1)[:, :, None] + right.square().sum(-1)[:, None] - 2 * product  # (B, N_src, N_dst)
    count = destinations.shape[-1]
    key = squared.long() * count + torch.arange(count, device=sources.device)  # no two alike, so no arbitrary choice
    best = key.min(dim=-1).values
    return -(best // count), best % count


def foremost(scores: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Positions of the `count` highest scores, (B, count), ties by position.

    Args:
        scores: (B, n).
        count: how many.
        first: boolean (B, n): these come before all others, whatever their score.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if first is not None:  # a key of its own: a large number added to the score would swallow it
        order = order.gather(1, (~first.gather(1, order)).to(torch.uint8).argsort(dim=1, stable=True))
    return order[:, :count]


def complement(index: Tensor, tokens: int) -> Tensor:
    """The tokens that are not in index (B, n), in raster order, (B, N - n)."""
    inside = torch.zeros(len(index), tokens, dtype=torch.uint8, device=index.device).scatter_(1, index, 1)
    # a stable sort needs no data-dependent shape
    return inside.argsort(dim=1, stable=True)[:, : tokens - index.shape[1]]


def merge_into(tokens: int, merged: Tensor, targets: Tensor) -> MergePlan:
    """The plan that merges some tokens into others.

    Args:
        tokens: number of image tokens N.
        merged: tokens that vanish, (B, r), none twice.
        targets: the token each of them joins, (B, r), none of them in `merged`.

    Returns:
        A plan with K = N - r; the tokens that stay represent their groups.
    """
    index = complement(merged, tokens)
    keep = torch.ones(len(merged), tokens, dtype=torch.long, device=merged.device).scatter_(1, merged, 0)
    slots = keep.cumsum(1) - 1
    return MergePlan(index=index, slots=slots.scatter(1, merged, slots.gather(1, targets)))


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
    sources, destinations = sources.to(metric.device), destinations.to(metric.device)
    best, partner = similar_partners(metric, sources, destinations)
    merged = foremost(best, removed)  # (B, removed), positions in `sources`
    return merge_into(metric.shape[1], sources[merged], destinations[partner.gather(1, merged)])
