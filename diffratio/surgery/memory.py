"""What surgery keeps from step to step of one run: the last output, and residuals of block ranges at full length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffratio.cost.run import Halves
from diffratio.errors import DiffratioError
from diffratio.methods.actions import Skip

Streams = tuple[Tensor | None, ...]  # what enters or leaves a block, one tensor a stream; None where a stream ends


class StepMemory:
    """Belongs to one run; a new run starts with an empty one.

    Args:
        ranges: block ranges whose residual is kept.
    """

    def __init__(self, ranges: tuple[Skip, ...] = ()) -> None:
        self.ranges = ranges
        self._outputs: dict[Halves, Tensor] = {}
        self._entered: dict[Skip, Streams] = {}
        self._residuals: dict[Skip, dict[Halves, Streams]] = {}

    def keep_output(self, output: Tensor, halves: Halves) -> None:
        """Keeps the prediction (B, ...) of an evaluated step."""
        self._outputs[halves] = output.detach()

    def output(self, batch: int, halves: Halves) -> Tensor:
        """The last prediction.

        Raises:
            DiffratioError: no step was evaluated before, or it had another batch.
        """
        kept = self._outputs.get(halves)
        if kept is None:
            raise DiffratioError("a step reuses the last output and none was computed in this run: step 0 must be full")
        _check_batch(kept, batch)
        return kept

    def enter(self, layer: int, streams: Streams) -> None:
        """A block of an evaluated step is entered."""
        for one in self.ranges:
            if one.first == layer:
                self._entered[one] = streams

    def leave(self, layer: int, streams: Streams, halves: Halves) -> None:
        """And left: ranges that end here get their residual, by stream."""
        for one in self.ranges:
            if one.last == layer and one in self._entered:
                kept = self._residuals.setdefault(one, {})
                # the conditional half alone, and batched with the other one, stand for each other: the newest counts
                for other in [known for known in kept if (known == "cond") != (halves == "cond") and known != "uncond"]:
                    del kept[other]
                kept[halves] = tuple(
                    None if before is None or after is None else (after - before).detach()
                    for before, after in zip(self._entered.pop(one), streams, strict=True)
                )

    def skip(self, one: Skip, streams: Streams, halves: Halves) -> Streams:
        """What would leave the range: what enters it plus the stored residual, by stream.

        Raises:
            DiffratioError: the range was never run in this run, or with another batch.
        """
        residual = _in_halves(self._residuals.get(one, {}), halves)
        if residual is None:
            raise DiffratioError(
                f"a step skips blocks {one.first} to {one.last} and no step of this run stored their residual: a full "
                "step must come before, and the method must name the range in skips(run)"
            )
        return tuple(None if add is None else _add(x, add) for x, add in zip(streams, residual, strict=True))


def _in_halves(kept: Mapping[Halves, Streams], wanted: Halves) -> Streams | None:
    """Stored streams for the halves of this forward; a missing unconditional half takes the conditional one's."""
    if wanted in kept:
        return kept[wanted]
    for order in ("cond_first", "uncond_first"):
        if wanted == "cond" and order in kept:
            return tuple(None if one is None else conditional(one, order) for one in kept[order])
        if wanted == order and "cond" in kept:
            return tuple(None if one is None else torch.cat([one, one]) for one in kept["cond"])
    return None


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
