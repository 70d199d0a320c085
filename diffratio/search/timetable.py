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
        factor: what a unit of it adds to the final sample, where later outputs stay as they are.
    """

    output: Tensor
    factor: float


def recorded(scheduler: Any, sample: Callable[[], object]) -> list[StepTrace]:
    """The steps of a dense run.

    A one-step solver is affine in the model's output and in the sample, and a multistep one nearly: what each step
    makes of them is found by taking it on copies of the scheduler, with the output and with the sample raised by one.
    Predicted clean samples follow the sample that they are made from: there the velocity is what stays, with gain 1.

    Args:
        scheduler: of the pipeline that samples; as it was afterwards.
        sample: samples, all in one batch.

    Returns:
        S steps in order.

    Raises:
        DiffratioError: the scheduler was given no outputs.
    """
    found: list[tuple[Tensor, float, float]] = []
    follows = scheduler.config.get("prediction_type") == "sample"
    plain = scheduler.step

    @functools.wraps(plain)
    def step(model_output: Tensor, timestep: Any, taken: Tensor, *args: Any, **options: Any) -> Any:
        ends = []
        for output, sample in ((0, 0), (1, 0), (0, 1)):
            copied = copy.deepcopy(scheduler)
            del copied.step
            given = model_output + output, timestep, taken + sample
            ends.append(copied.step(*given, *args, **options | {"return_dict": False})[0].double())
        factor, gain = (float((end - ends[0]).mean()) for end in ends[1:])
        found.append((model_output.float().cpu(), factor, 1.0 if follows else gain))
        return plain(model_output, timestep, taken, *args, **options)

    scheduler.step = step
    try:
        sample()
    finally:
        del scheduler.step
    if not found:
        raise DiffratioError(f"{type(scheduler).__name__} was given no steps: nothing can be recorded")
    steps, later = [], 1.0
    for output, factor, gain in reversed(found):
        steps.append(StepTrace(output, factor * later))
        later *= gain
    return steps[::-1]


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
