"""Timetables to start from: which steps to compute so that samples drift least, from the dense run alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffratio.errors import DiffratioError

Timetable = tuple[int, ...]
KINDS = ("reused", "extrapolated")  # what stands in for an output that is not computed
SHARES = (0.5, 0.8, 0.35, 0.65, 0.9, 0.25, 0.7, 0.4, 0.15, 0.6)  # of the steps that are computed, most wanted first


@dataclass(frozen=True)
class StepTrace:
    """A step of a dense run.

    Args:
        output: what the scheduler was given, guidance halves combined; (B, C, h, w) on the CPU.
        factor: what a unit of it adds to the sample.
    """

    output: Tensor
    factor: float


def recorded(scheduler: Any, sample: Callable[[], object]) -> list[StepTrace]:
    """The steps of a dense run.

    A one-step solver is affine in the model's output, and a multistep one nearly: the factor is found by taking each
    step on copies of the scheduler, once with the output raised by one.

    Args:
        scheduler: of the pipeline that samples; as it was afterwards.
        sample: samples, all in one batch.

    Returns:
        S steps in order.

    Raises:
        DiffratioError: the scheduler was given no outputs.
    """
    found: list[StepTrace] = []
    plain = scheduler.step

    @functools.wraps(plain)
    def step(model_output: Tensor, timestep: Any, taken: Tensor, *args: Any, **options: Any) -> Any:
        ends = []
        for raised in (0.0, 1.0):
            copied = copy.deepcopy(scheduler)
            del copied.step
            ends.append(copied.step(model_output + raised, timestep, taken, *args, **options | {"return_dict": False}))
        factor = float((ends[1][0] - ends[0][0]).double().mean())
        found.append(StepTrace(model_output.float().cpu(), factor))
        return plain(model_output, timestep, taken, *args, **options)

    scheduler.step = step
    try:
        sample()
    finally:
        del scheduler.step
    if not found:
        raise DiffratioError(f"{type(scheduler).__name__} was given no steps: nothing can be recorded")
    return found


class Drift:
    """How far samples move off the dense path where outputs are not computed, to first order.

    The drift of a step is linear in the S outputs of the dense run, so its mean square is a quadratic form of their
    Gram matrix, whatever the size of the samples.

    Args:
        trace: the dense run's steps.
        levels: noise level of each.
        extrapolated: whether a missing output is carried on from the last two computed ones, by noise level; it is the
            last one otherwise, and where there is one alone.
    """

    def __init__(self, trace: Sequence[StepTrace], levels: Sequence[float], extrapolated: bool = False) -> None:
        outputs = torch.stack([one.output.double().flatten() for one in trace])
        self.gram = outputs @ outputs.T / outputs.shape[1]  # (S, S)
        self.factors, self.levels = [one.factor for one in trace], list(levels)
        self.extrapolated = extrapolated

    @property
    def steps(self) -> int:
        """S."""
        return len(self.factors)

    def segments(self, before: int | None, at: int) -> list[float]:
        """Mean squared drift from a computed step to before step q, for q from the next step to S.

        Args:
            before: the computed step before it; None of the first one.
            at: the computed step.
        """
        weights = [0.0] * self.steps
        rows = [weights.copy()]
        for step in range(at + 1, self.steps):
            ahead = 0.0
            if self.extrapolated and before is not None:
                ahead = (self.levels[step] - self.levels[at]) / (self.levels[at] - self.levels[before])
                weights[before] -= self.factors[step] * ahead
            weights[at] += self.factors[step] * (1 + ahead)
            weights[step] -= self.factors[step]
            rows.append(weights.copy())
        drifts = torch.tensor(rows, dtype=torch.float64)  # of each end, by output
        found: list[float] = ((drifts @ self.gram) * drifts).sum(1).tolist()
        return found


def timetables(drift: Drift, shares: Sequence[float] = SHARES) -> list[Timetable]:
    """For each share of computed steps those whose summed drift is least, by dynamic programming over pairs of them.

    Args:
        drift: of the dense run.
        shares: of the S steps, in (0, 1].

    Returns:
        Numbers of computed steps, rising, step 0 always among them; one timetable for each different count.
    """
    steps = drift.steps
    cost: dict[tuple[int | None, int], list[float]] = {(None, 0): drift.segments(None, 0)}
    cost |= {(before, at): drift.segments(before, at) for at in range(steps) for before in range(at)}
    # by the last two computed steps: least drift before the last of them, and all computed steps
    best: dict[tuple[int | None, int], tuple[float, Timetable]] = {(None, 0): (0.0, (0,))}
    ends: list[Timetable] = []
    for _ in range(steps - 1):
        ends.append(min((own + cost[pair][steps - 1 - pair[1]], table) for pair, (own, table) in best.items())[1])
        further: dict[tuple[int | None, int], tuple[float, Timetable]] = {}
        for (before, at), (own, table) in best.items():
            for then in range(at + 1, steps):
                one = own + cost[before, at][then - at - 1], (*table, then)
                if (at, then) not in further or one < further[at, then]:
                    further[at, then] = one
        best = further
    return [
        ends[count - 1] for count in dict.fromkeys(max(1, min(steps - 1, round(share * steps))) for share in shares)
    ]
