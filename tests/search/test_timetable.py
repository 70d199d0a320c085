"""Where a search starts: drift is exact where outputs do not depend on the sample, and timetables are best there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffratio.sampling.schedulers import make_scheduler, set_steps
from diffratio.search.timetable import Drift, StepTrace, recorded, timetables

STEPS = 7


def outputs() -> Tensor:
    """(S, 2, 1, 4, 4): smooth in the step, with some noise."""
    draws = torch.Generator().manual_seed(0)
    line = torch.linspace(0, 3, STEPS).view(-1, 1, 1, 1, 1)
    ends = torch.randn(3, 2, 1, 4, 4, generator=draws)
    return ends[0] * torch.sin(line) + ends[1] * line + 0.2 * torch.randn(STEPS, 2, 1, 4, 4, generator=draws)


def run(scheduler: Any, made: Tensor) -> Tensor:
    """The last sample of a model that gives these outputs whatever it is shown."""
    set_steps(scheduler, STEPS)
    x = torch.ones(2, 1, 4, 4)
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(made[step], t, x, return_dict=False)[0]
    return x


def replaced(made: Tensor, levels: list[float], table: tuple[int, ...], extrapolated: bool) -> Tensor:
    """The outputs that a run with this timetable has."""
    found = []
    for step in range(STEPS):
        known = [one for one in table if one <= step]
        last = made[known[-1]]
        if known[-1] != step and extrapolated and len(known) > 1:
            p, q = known[-2:]
            last = last + (last - made[p]) * (levels[step] - levels[q]) / (levels[q] - levels[p])
        found.append(last)
    return torch.stack(found)


@pytest.mark.parametrize(("name", "objective"), [("flow_euler", "flow"), ("ddim", "noise")])
def test_factors_carry_outputs_to_samples(name: str, objective: str) -> None:
    """A change of any step's output ends in the last sample times the factor."""
    scheduler, made = make_scheduler(name, objective), outputs()
    trace = recorded(scheduler, lambda: run(scheduler, made))
    assert "step" not in vars(scheduler)  # as it was
    assert len(trace) == STEPS and all(torch.equal(one.output, kept) for one, kept in zip(trace, made, strict=True))
    for step in (0, 3, STEPS - 1):
        changed = made.clone()
        changed[step] += 0.5
        apart = run(scheduler, changed) - run(scheduler, made)
        assert float(apart.mean()) == pytest.approx(0.5 * trace[step].factor, rel=1e-2)
        assert float(apart.std()) < 1e-2 * abs(float(apart.mean()))


def test_predicted_samples_weigh_as_velocities() -> None:
    """x0 = x - u v: an error of x0 at level u is one of v over u."""
    scheduler = make_scheduler("dpm_solver", "flow_sample")
    trace = recorded(scheduler, lambda: run(scheduler, outputs()))
    levels = [float(one) for one in scheduler.sigmas]
    assert trace[0].factor == pytest.approx(1 - levels[1] / levels[0], rel=1e-3)  # the first step is of first order
    assert all(0 < one.factor < 1.5 for one in trace) and trace[-1].factor == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("extrapolated", [False, True])
def test_drift_is_the_distance_of_samples(extrapolated: bool) -> None:
    """Flow Euler adds outputs up, so with fixed outputs the drift of one segment is the whole error."""
    scheduler, made = make_scheduler("flow_euler"), outputs()
    trace = recorded(scheduler, lambda: run(scheduler, made))
    levels = [float(one) for one in scheduler.sigmas[:STEPS]]
    drift = Drift(trace, levels, extrapolated)
    table = (0, 1, 2)  # the last segment is all that is not computed
    apart = run(scheduler, replaced(made, levels, table, extrapolated)) - run(scheduler, made)
    assert drift.segments(1, 2)[-1] == pytest.approx(float(apart.square().mean()), rel=1e-3)
    assert drift.segments(1, 2)[0] == 0


@pytest.mark.parametrize("extrapolated", [False, True])
def test_timetables_are_those_of_a_full_enumeration(extrapolated: bool) -> None:
    levels = [1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.1]
    trace = [StepTrace(one, -0.15) for one in outputs()]
    drift = Drift(trace, levels, extrapolated)

    def summed(table: tuple[int, ...]) -> float:
        pairs = zip((None, *table), table, (*table[1:], STEPS), strict=False)
        return sum(drift.segments(before, at)[end - at - 1] for before, at, end in pairs)

    shares = [count / STEPS for count in range(1, STEPS)]
    for count, table in enumerate(timetables(drift, shares), start=1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        assert len(table) == count and table in every
        assert summed(table) == pytest.approx(min(map(summed, every)), rel=1e-9, abs=1e-15)
