"""Runs: regions, JSON, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffratio.cost.run import SamplingRun, region_of, regions_of, uniform_run
from diffratio.errors import DiffratioError
from diffratio.tokens.grid import TokenGrid

GRID = TokenGrid(4, 6)


def _dpm_solver() -> list[float]:
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(20)
    return (scheduler.timesteps.double() / 1000).tolist()


def _karras() -> list[float]:
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    return (scheduler.timesteps.double() / 1000).tolist()


def _sd3() -> list[float]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)  # the number of its pipeline
    return (scheduler.timesteps.double() / 1000).tolist()


@pytest.mark.parametrize(
    ("levels", "expected"), [(_dpm_solver, (4, 5, 6, 5)), (_karras, (6, 3, 4, 7)), (_sd3, (3, 4, 7, 14))]
)
def test_samplers_spread_their_steps_unevenly(levels: Callable[[], list[float]], expected: tuple[int, ...]) -> None:
    counts = SamplingRun(tuple(levels()), GRID).region_counts(4)
    assert counts == expected


@pytest.mark.parametrize("regions", range(1, 21))
def test_a_uniform_run_visits_regions_by_exact_arithmetic(regions: int) -> None:
    """No level that stands on an edge may fall to the wrong side by rounding."""
    steps = 20
    counts = [0] * regions
    for i in range(1, steps + 1):
        counts[min(regions - 1, i * regions // steps)] += 1
    assert uniform_run(steps, GRID).region_counts(regions) == tuple(counts)


@given(st.floats(0, 1), st.integers(1, 1000))
def test_regions_of_tensors_and_numbers_agree(level: float, regions: int) -> None:
    single = torch.tensor([level], dtype=torch.float32)
    assert regions_of(single, regions).tolist() == [region_of(single.item(), regions)]
    assert 0 <= region_of(level, regions) < regions
    assert abs(region_of(level, regions) - min(regions - 1, regions * level)) <= 1


def test_edges_belong_to_the_region_above() -> None:
    assert [region_of(u, 4) for u in (0, 0.2499, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 1, 2, 3, 3]
    tenths = torch.arange(11) / 10  # 0.3 and 0.7 are below themselves in float32 or times ten
    assert regions_of(tenths, 10).tolist() == [*range(10), 9]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.sampled_from(["none", "cfg"]),
    st.integers(0, 200),
    st.integers(1, 64),
)
def test_json_round_trip(levels: list[float], guidance: Any, text: int, batch: int) -> None:
    run = SamplingRun(tuple(levels), GRID, guidance, text, batch)
    assert SamplingRun.from_json(json.loads(json.dumps(run.to_json()))) == run


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_guided_steps_count_both_halves(guided: list[bool]) -> None:
    plain = uniform_run(len(guided), GRID)
    run = plain.with_guided(tuple(guided))
    assert SamplingRun.from_json(json.loads(json.dumps(run.to_json()))) == run
    assert [run.halves_at(step) for step in range(run.steps)] == [2 if both else 1 for both in guided]
    assert run.forwards == len(guided) + sum(guided) == sum(run.region_forwards(7))
    assert plain.forwards == 2 * plain.steps and sum(plain.region_counts(7)) == plain.steps
    assert (run == plain) == all(guided) == ("guided" not in run.to_json())


GOOD = uniform_run(3, GRID).to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"noise_levels": []},
        {"noise_levels": [1.5]},
        {"noise_levels": [float("nan")]},
        {"noise_levels": ["a"]},
        {"noise_levels": None},
        {"grid": [4]},
        {"grid": [0, 4]},
        {"grid": [4.5, 4]},
        {"grid": [float("inf"), 4]},
        {"grid": [True, 4]},
        {"guidance": "both"},
        {"text_tokens": -1},
        {"text_tokens": 2.5},
        {"batch": 0},
        {"batch": "2"},
        {"guided": [True, False]},
        {"guided": [1, 0, 1]},
        {"guided": "yes"},
        {"guided": [True, False, True], "guidance": "none"},
    ],
)
def test_runs_that_make_no_sense_are_refused(change: dict) -> None:
    with pytest.raises(DiffratioError) as error:
        SamplingRun.from_json(GOOD | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("document", [None, [], 3, "run", {}, {"grid": [4, 4]}])
def test_documents_that_are_no_run_are_refused(document: object) -> None:
    with pytest.raises(DiffratioError, match="not a sampling run"):
        SamplingRun.from_json(document)


def test_a_run_of_no_steps_is_refused() -> None:
    with pytest.raises(DiffratioError, match="at least 1 and at most .*, got 0"):
        uniform_run(0, GRID)
