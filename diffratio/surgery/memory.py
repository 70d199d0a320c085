"""What surgery keeps from step to step of one run: the last two outputs, and block ranges' residuals at full length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffratio.cost.run import Halves
from diffratio.errors import DiffratioError
from diffratio.methods.actions import Skip
from diffratio.methods.results import of_halves

Streams = tuple[Tensor | None, ...]  # what enters or leaves a block, one tensor a stream; None where a stream ends


@dataclass(frozen=True)
class Residual:
    """What a block range added at one full step.

    Args:
        level: noise level u of the step.
        halves: which guidance halves its batch held.
        streams: one tensor a stream, None where a stream ends in the range.
    """

    level: float
    halves: Halves
    streams: Streams

    def seen_from(self, wanted: Halves) -> Streams | None:
        """For the halves of another forward; a missing unconditional half takes the conditional one's."""
        if wanted != self.halves and {wanted, self.halves} not in ({"cond", "cond_first"}, {"cond", "uncond_first"}):
            return None
        return tuple(None if one is None else of_halves(self.halves, one, wanted) for one in self.streams)


class StepMemory:
    """Belongs to one run; a new run starts with an empty one.

    Args:
        ranges: block ranges whose residual is kept; of those that are extrapolated, two of them.
    """

    def __init__(self, ranges: tuple[Skip, ...] = ()) -> None:
        self.depths: dict[tuple[int, int], int] = {}
        for one in ranges:
            self.depths[one.blocks] = max(self.depths.get(one.blocks, 1), 2 if one.extrapolate else 1)
        self._outputs: dict[Halves, list[tuple[float, Tensor]]] = {}  # newest last
        self._entered: dict[tuple[int, int], Streams] = {}
        # newest last; an unconditional half in a forward of its own is kept apart from everything else
        self._residuals: dict[tuple[tuple[int, int], bool], list[Residual]] = {}

    def keep_output(self, output: Tensor, halves: Halves, level: float = 0.0) -> None:
        """Keeps the prediction (B, ...) of an evaluated step, at a noise level."""
        kept = self._outputs.setdefault(halves, [])
        if kept and kept[-1][0] == level:  # the same step, forwarded once more
            kept.pop()
        kept.append((level, output.detach()))
        del kept[:-2]

    def output(self, batch: int, halves: Halves, level: float | None = None) -> Tensor:
        """The last prediction, or with a noise level what the last two say for it.

        Raises:
            DiffratioError: no step was evaluated before, or it had another batch.
        """
        kept = self._outputs.get(halves)
        if not kept:
            raise DiffratioError("a step reuses the last output and none was computed in this run: step 0 must be full")
        (end, last), before = kept[-1], kept[:-1]
        _check_batch(last, batch)
        if level is None or not before:
            return last
        return _lerp(before[0][1], last, _weight(before[0][0], end, level))

    def enter(self, layer: int, streams: Streams) -> None:
        """A block of an evaluated step is entered."""
        for one in self.depths:
            if one[0] == layer:
                self._entered[one] = streams

    def leave(self, layer: int, streams: Streams, halves: Halves, level: float = 0.0) -> None:
        """And left, at a noise level: ranges that end here get their residual, by stream."""
        for one, depth in self.depths.items():
            if one[1] == layer and one in self._entered:
                added = tuple(
                    None if before is None or after is None else (after - before).detach()
                    for before, after in zip(self._entered.pop(one), streams, strict=True)
                )
                kept = self._residuals.setdefault((one, halves == "uncond"), [])
                if kept and kept[-1].level == level:  # the same step, forwarded once more
                    kept.pop()
                kept.append(Residual(level, halves, added))
                del kept[:-depth]

    def skip(self, one: Skip, streams: Streams, halves: Halves, level: float = 0.0) -> Streams:
        """What would leave the range: what enters it plus the stored residual, by stream.

        Args:
            one: the range, and whether its residual is extrapolated.
            streams: what enters it.
            halves: which guidance halves the batch holds.
            level: noise level u of this step.

        Raises:
            DiffratioError: the range was never run in this run, or with another batch.
        """
        kept = self._residuals.get((one.blocks, halves == "uncond"), [])
        residual = kept[-1].seen_from(halves) if kept else None
        if residual is None:
            raise DiffratioError(
                f"a step skips blocks {one.first} to {one.last} and no step of this run stored their residual: a full "
                "step must come before, and the method must name the range in skips(run)"
            )
        if one.extrapolate:
            residual = _extrapolated(kept, residual, halves, level)
        return tuple(None if add is None else _add(x, add) for x, add in zip(streams, residual, strict=True))


def _extrapolated(kept: Sequence[Residual], newest: Streams, halves: Halves, level: float) -> Streams:
    """r(u) = r1 + (r1 - r0) (u - u1) / (u1 - u0), in noise levels: steps need not be even."""
    older = kept[-2].seen_from(halves) if len(kept) > 1 else None
    if older is None:
        return newest
    weight = _weight(kept[-2].level, kept[-1].level, level)
    return tuple(
        None if before is None or after is None else _lerp(before, after, weight)
        for before, after in zip(older, newest, strict=True)
    )


def _weight(start: float, end: float, level: float) -> float:
    """Of the newer one of two values at noise levels; equal levels never stand beside each other."""
    return 1 + (level - end) / (end - start)


def _lerp(before: Tensor, after: Tensor, weight: float) -> Tensor:
    _check_batch(before, after.shape[0])
    return torch.lerp(before, after, weight)


def _add(x: Tensor | None, residual: Tensor) -> Tensor | None:
    if x is None:
        return None
    _check_batch(residual, x.shape[0])
    return x + residual


def _check_batch(kept: Tensor, batch: int) -> None:
    if kept.shape[0] != batch:
        raise DiffratioError(
            f"the batch changed from {kept.shape[0]} to {batch} within a run whose method keeps state from step to step"
        )


def conditional(value: Any, halves: Halves, batch: int | None = None) -> Any:
    """The conditional half of a batched argument; lists and dictionaries by entry.

    Args:
        value: a tensor (2B, ...), or a container of them; what does not hold the batch stays as it is.
        halves: how the batch holds the halves.
        batch: 2B; None takes the tensor's own.
    """
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == (batch or value.shape[0]):
        return value.chunk(2)[0 if halves == "cond_first" else 1]
    if isinstance(value, dict):
        return {key: conditional(one, halves, batch) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(conditional(one, halves, batch) for one in value)
    return value
