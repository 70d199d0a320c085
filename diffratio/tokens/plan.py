"""Plans: which tokens one place of one block computes, and how a full-length result is restored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor


class Plan(Protocol):
    """What every plan can do. `kept` is a plain int, so shapes stay static."""

    @property
    def kept(self) -> int:
        """Number of tokens K that are computed."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C)."""
        ...

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        """Computed tokens (B, K, C) and the full-length input x (B, N, C) -> full-length result (B, N, C)."""
        ...

    def take(self, argument: Tensor) -> Tensor:
        """Slices another per-token argument (B or 1, N, ...) to the computed tokens."""
        ...

    def arguments(self) -> dict[str, Tensor]:
        """What the family's own attention processor is given at an attention site; empty where nothing is."""
        ...


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, N, ...) at index (B, K), or (1, K) for one index shared by the batch -> (B, K, ...)."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    if x.shape[0] == 1:
        return x[0].index_select(0, index.flatten()).unflatten(0, index.shape)
    rows = token_rows(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def token_rows(index: Tensor, tokens: int, samples: Tensor | None = None) -> Tensor:
    """Tokens of samples as rows of the flattened batch (B N, ...).

    Whole rows are moved by `index_select` and `index_copy`: an element-wise gather or scatter over an expanded index
    costs four to six times as much, forward and backward.

    Args:
        index: tokens (b, K).
        tokens: number of tokens N of a sample.
        samples: which samples of the batch these are, (b,); None means the first b.

    Returns:
        (b, K).
    """
    if samples is None:
        samples = torch.arange(index.shape[0], device=index.device)
    return index + (samples * tokens)[:, None]


@dataclass(frozen=True)
class KeepPlan:
    """A subset of the tokens is computed.

    Args:
        index: kept tokens in raster order, (B, K), or (1, K) when the batch shares them.
        fill: for each of the N tokens the slot in 0..K-1 whose result it copies, (B or 1, N); None leaves the dropped
            tokens as they were (bypass).
    """

    index: Tensor
    fill: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of tokens K that are computed."""
        return self.index.shape[1]

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C)."""
        return gather_tokens(x, self.index)

    def take(self, argument: Tensor) -> Tensor:
        """Slices a per-token argument by the same index."""
        return gather_tokens(argument, self.index)

    def arguments(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        """One gather (fill), or one copy of rows onto the untouched input (bypass). The result has the dtype of `y`."""
        if self.fill is not None:
            return gather_tokens(y, self.fill)
        x = x.to(y.dtype)  # under autocast they may differ
        if self.index.shape[0] == 1:
            return x.index_copy(1, self.index[0], y)
        rows = token_rows(self.index, x.shape[1])
        return x.flatten(0, 1).index_copy(0, rows.flatten(), y.flatten(0, 1)).view(x.shape)


@dataclass(frozen=True)
class MergePlan:
    """Groups of tokens are averaged, computed once, and copied back to every member.

    Args:
        index: one representative of each group in raster order, (B or 1, K); `take` uses it.
        slots: group of each token, (B or 1, N), values in 0..K-1.
        order: tokens sorted by group, (B or 1, N); None is found when it is needed (see `prepared`).
        lengths: members of each group, (B or 1, K); goes with `order`.
        key_bias: at an attention site, added to the logits of every group as a key; 0 adds nothing.
    """

    index: Tensor
    slots: Tensor
    order: Tensor | None = None
    lengths: Tensor | None = None
    key_bias: float = 0.0

    @property
    def kept(self) -> int:
        """Number of groups K that are computed."""
        return self.index.shape[1]

    def segments(self) -> tuple[Tensor, Tensor]:
        """Tokens sorted by group (B or 1, N), and the members of each group (B or 1, K)."""
        if self.order is not None and self.lengths is not None:
            return self.order, self.lengths
        ordered, order = self.slots.sort(dim=1, stable=True)
        groups = torch.arange(self.kept, device=order.device).repeat(len(order), 1)
        ends = torch.searchsorted(ordered, groups, right=True)
        return order, torch.diff(ends, dim=1, prepend=ends.new_zeros(len(order), 1))

    def prepared(self) -> Self:
        """The same plan with its sort done: worth it where several places share the plan."""
        order, lengths = self.segments()
        return replace(self, order=order, lengths=lengths)

    def repeated(self, times: int) -> Self:
        """The same plan for a batch that holds the samples several times, one copy after the other."""
        index, slots = self.index.repeat(times, 1), self.slots.repeat(times, 1)
        if self.order is None or self.lengths is None:
            return replace(self, index=index, slots=slots)
        return replace(
            self, index=index, slots=slots, order=self.order.repeat(times, 1), lengths=self.lengths.repeat(times, 1)
        )

    def dropped(self) -> KeepPlan:
        """The same groups, but only the representatives are computed and the other members copy their result."""
        return KeepPlan(self.index, self.slots)

    def pool(self, x: Tensor, reduction: str) -> Tensor:
        """(B, N, C) -> (B, K, C): `mean` or `max` of each group, as a sort and a segmented reduction (no atomics)."""
        batch, tokens, channels = x.shape
        order, lengths = self.segments()
        rows = gather_tokens(x, order).reshape(batch * tokens, channels)
        lengths = lengths.expand(batch, -1).reshape(-1)
        return torch.segment_reduce(rows, reduction, lengths=lengths, axis=0, unsafe=True).view(batch, -1, channels)

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C): plain mean of each group."""
        return self.pool(x, "mean")

    def take(self, argument: Tensor) -> Tensor:
        """The representative's entry of a per-token argument."""
        return gather_tokens(argument, self.index)

    def arguments(self) -> dict[str, Tensor]:
        """The bias by key, (1, K) in float32."""
        if self.key_bias == 0:
            return {}
        return {"key_bias": torch.full((1, self.kept), self.key_bias, device=self.index.device)}

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        """One gather: every member copies its group's result."""
        return gather_tokens(y, self.slots.expand(y.shape[0], -1))


@dataclass(frozen=True)
class BlendPlan(MergePlan):
    """A merge whose vanished tokens take their group's result mixed with a stored one of their own.

    The representatives count as computed on their own: they take the group's result as it is.

    Args:
        stored: result of an earlier step at full length (B, N, C).
        blend: weight of the stored result in [0, 1]; 0 is the plain merge.
    """

    stored: Tensor | None = None
    blend: float = 0.0

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        """(1 - blend) of the group's result and blend of the stored one, at the tokens that vanished."""
        fresh = super().restore(y, x)
        if self.stored is None:
            return fresh
        vanished = torch.ones_like(self.slots, dtype=torch.bool).scatter(1, self.index, False)  # (B or 1, N)
        mixed = torch.lerp(fresh, self.stored.to(fresh.dtype), self.blend)
        return torch.where(vanished[..., None], mixed, fresh)


@dataclass(frozen=True)
class AttentionPlan:
    """Queries and keys of one self-attention, chosen separately; the attention processor does the gathering.

    Args:
        tokens: number of tokens N.
        keys: tokens that are keys and values, (B or 1, M); None takes all.
        queries: tokens that are queries, and how the others get a result; None computes all of them.
        bias: added to the logits of each chosen key, float32, (B or 1, M); None adds nothing.
    """

    tokens: int
    keys: Tensor | None = None
    queries: KeepPlan | None = None
    bias: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of queries K."""
        return self.tokens if self.queries is None else self.queries.kept

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C): the queries."""
        return x if self.queries is None else self.queries.reduce(x)

    def take(self, argument: Tensor) -> Tensor:
        """The queries' entries of a per-token argument."""
        return argument if self.queries is None else self.queries.take(argument)

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        """Results of the queries (B, K, C) -> (B, N, C)."""
        return y if self.queries is None else self.queries.restore(y, x)

    def arguments(self) -> dict[str, Tensor]:
        """What the family's attention processor is given."""
        query_index = None if self.queries is None else self.queries.index
        given = {"query_index": query_index, "key_index": self.keys, "key_bias": self.bias}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class NormMergePlan(MergePlan):
    """A merge whose groups keep their length: direction of the mean, norm of the longest member.

    A plain mean of tokens that point apart is shorter than each of them, which later layers have never seen.
    """

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, C); a group whose mean is zero has no direction and stays zero."""
        mean = self.pool(x, "mean")
        wide = torch.promote_types(x.dtype, torch.float32)  # squares of half-precision activations overflow
        longest = self.pool(torch.linalg.vector_norm(x.to(wide), dim=-1, keepdim=True), "max")  # (B, K, 1)
        length = torch.linalg.vector_norm(mean.to(wide), dim=-1, keepdim=True)
        return (mean.to(wide) * (longest / length.clamp_min(torch.finfo(wide).tiny))).to(mean.dtype)
