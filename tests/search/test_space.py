"""The genome and NSGA-II on it: what can be spelled can be carried out, and a planted optimum is found."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffratio.backbones import get_backbone
from diffratio.cost.run import uniform_run
from diffratio.methods.step_schedule import StepChoice, StepSchedule
from diffratio.search.space import Space, spelled
from diffratio.surgery import describe
from diffratio.tokens.grid import TokenGrid

FULL = Space(6, ("C", "S", "E", "R"), (0.25, 0.5))
MODEL = describe(get_backbone("dit").tiny())


@settings(max_examples=40)
@given(st.lists(st.integers(0, len(FULL.alphabet) - 1), min_size=6, max_size=6))
def test_every_genome_can_be_carried_out_once_repaired(codes: list[int]) -> None:
    found = FULL.repaired(codes)
    choices = FULL.choices(found)
    actions, ratios = [one.action for one in choices], [one.ratio for one in choices]
    StepSchedule.made_for(MODEL, uniform_run(6, TokenGrid(4, 4)), actions, ratios)  # its checks
    assert FULL.repaired(found) == found
    assert "E" not in actions[: next((at for at in range(6) if actions[:at].count("C") == 2), 6)]
    changed = [step for step in range(6) if found[step] != codes[step]]
    assert all(step == 0 or FULL.alphabet[codes[step]].action == "E" for step in changed)


def test_people_schedules_are_among_the_seeds() -> None:
    found = {spelled(FULL.choices(codes)) for codes in FULL.seeds()}
    assert {"C C C C C C", "C S C S C S", "C R C R C R", "C C S C S S", "C0.5 C0.5 C0.5 C0.5 C0.5 C0.5"} <= found
    first = FULL.population(16, seed=3)
    assert len(first) == len(set(first)) == 16 and first == FULL.population(16, seed=3)
    assert first != FULL.population(16, seed=4)
    assert len(Space(2, ("C", "R")).population(50, seed=0)) == 2  # there are no more
    assert FULL.alphabet[0] == StepChoice()


def test_a_planted_optimum_is_found_and_repeats() -> None:
    """Dropping a step costs its own weight: at each count the best is known."""
    pytest.importorskip("pymoo")
    from diffratio.search.nsga import evolve

    weights = (100.0, 1.0, 9.0, 2.0, 30.0, 4.0, 25.0, 3.0, 7.0, 12.0, 5.0, 18.0)
    space = Space(len(weights), ("C", "R"))

    def run(seed: int) -> dict[tuple[int, ...], tuple[float, float]]:
        asked: dict[tuple[int, ...], tuple[float, float]] = {}

        def objectives(codes: tuple[int, ...]) -> tuple[float, float]:
            assert codes[0] == 0
            asked[codes] = sum(w for w, code in zip(weights, codes, strict=True) if code), float(codes.count(0))
            return asked[codes]

        evolve(space, space.population(24, seed), 24, 20, seed, objectives)
        return asked

    found = run(0)
    assert list(found) == list(run(0)) != list(run(1))
    assert len(found) < 400  # of 2,048; as many random draws find 8 of the 12
    best = {
        count: min(sum(dropped) for dropped in itertools.combinations(weights[1:], 12 - count))
        for count in range(1, 13)
    }
    reached = {count: min(error for error, cost in found.values() if cost == count) for count in best}
    assert sum(reached[count] == best[count] for count in best) >= 10
    assert sum(reached.values()) - sum(best.values()) <= 5
