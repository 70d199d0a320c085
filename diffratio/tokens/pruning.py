"""Pruning of tokens that are like a base token: which go, and from where their results come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import cell_members, complement, foremost, merge_into, similar_partners
from diffratio.tokens.plan import KeepPlan

CELL = 2


def base_tokens(scores: Tensor, grid: TokenGrid, cell: int = CELL) -> Tensor:
    """The token of the highest score in each whole cell.

    Args:
        scores: (B, N).
        grid: token grid.
        cell: side of a cell.

    Returns:
        (B, cells), in raster order.
    """
    members = cell_members(grid, cell).to(scores.device)  # (cells, cell^2)
    best = scores[:, members].argmax(-1, keepdim=True)  # (B, cells, 1)
    return members.expand(len(scores), -1, -1).gather(-1, best)[..., 0].sort(dim=1).values


def prune_similar(metric: Tensor, base: Tensor, removed: int, from_kept: bool = False) -> KeepPlan:
    """Prunes the tokens that are most similar to a base token.

    Args:
        metric: (B, N, C); tokens are compared by cosine.
        base: base tokens (B, n); none of them is pruned.
        removed: pruned tokens r, at most N - n.
        from_kept: a pruned token's result is that of the most similar of all kept tokens, instead of that of the most
            similar base token.

    Returns:
        A plan with K = N - r.
    """
    tokens = metric.shape[1]
    others = complement(base, tokens)
    similarity, partner = similar_partners(metric, others, base)
    chosen = foremost(similarity, removed)  # (B, r), positions in `others`
    pruned, targets = others.gather(1, chosen), base.gather(1, partner.gather(1, chosen))
    if from_kept:
        kept = complement(pruned, tokens)
        targets = kept.gather(1, similar_partners(metric, pruned, kept)[1])
    return merge_into(tokens, pruned, targets).dropped()


@dataclass(frozen=True)
class StoredPlan(KeepPlan):
    """A subset is computed; the other tokens take the result that was stored when they were last computed.

    Args:
        stored: that result (B, N, C); None where all tokens are computed.
        keep: is given the full-length result, to be stored for the next time.
    """

    stored: Tensor | None = None
    keep: Callable[[Tensor], None] = field(default=lambda result: None)

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C); x itself where all are computed: a copy of another layout rounds differently."""
        return x if self.stored is None else super().reduce(x)

    def take(self, argument: Tensor) -> Tensor:
        """As `reduce`."""
        return argument if self.stored is None else super().take(argument)

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        """Computed tokens on top of the stored ones."""
        result = y if self.stored is None else super().restore(y, self.stored)
        self.keep(result.detach())
        return result


def all_tokens(tokens: int, device: torch.device) -> Tensor:
    """An index of every token, (1, N)."""
    return torch.arange(tokens, device=device)[None]
