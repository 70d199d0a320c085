"""Keep schedules and rounding to a budget."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ratios import LAYERS, REGIONS, table_of

from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.routing.schedule import KeepSchedule, constant_table, first_within, moved, round_to_budget
from diffratio.tokens.grid import TokenGrid

RUN = uniform_run(20, TokenGrid(8, 8))
tables = st.lists(st.lists(st.floats(0.1, 1), min_size=REGIONS, max_size=REGIONS), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=40)
@given(tables, st.floats(0.15, 1), st.one_of(st.none(), tables))
def test_rounding_meets_the_budget(values: list[list[float]], budget: float, harm: list | None) -> None:
    costs = table_of()
    lowest = costs.fraction(constant_table(LAYERS, REGIONS, 1))
    if budget < lowest:
        with pytest.raises(BudgetUnreachable) as error:
            round_to_budget(values, costs, budget, harm)
        assert error.value.reachable == (lowest, 1.0)
        return
    table = round_to_budget(values, costs, budget, harm)
    assert budget - 0.01 <= costs.fraction(table) <= budget
    assert all(1 <= bin_ <= 10 for row in table for bin_ in row)
    KeepSchedule(table, costs.run, budget)


@settings(max_examples=30)
@given(tables, st.floats(0.2, 1), st.sampled_from([(0.9, 0.3), (1.0,), (0.1, 0.2, 0.9, 0.95, 1.0)]))
def test_rounding_never_exceeds_the_budget_on_coarse_runs(
    values: list[list[float]], budget: float, levels: tuple[float, ...]
) -> None:
    costs = table_of(SamplingRun(levels, TokenGrid(2, 3)))
    if budget < costs.fraction(constant_table(LAYERS, REGIONS, 1)):
        return
    table = round_to_budget(values, costs, budget)
    assert costs.fraction(table) <= budget
    if costs.fraction(table) < budget - 0.01:  # then no cell has room for another bin
        for layer in range(LAYERS):
            for region in range(REGIONS):
                if table[layer][region] < 10 and costs.run.region_counts(REGIONS)[region]:
                    assert costs.fraction(moved(table, (layer, region), 1)) > budget


def test_rounding_of_ratios_on_bins_keeps_them() -> None:
    costs = table_of()
    bins = ((10, 7, 4, 2), (9, 8, 3, 1), (5, 5, 5, 5), (6, 10, 10, 3), (1, 2, 3, 4))
    values = [[bin_ / 10 for bin_ in row] for row in bins]
    assert round_to_budget(values, costs, costs.fraction(bins)) == bins


def test_rounding_cuts_where_the_harm_is_least() -> None:
    costs = table_of()
    harm = [[1.0] * REGIONS for _ in range(LAYERS)]
    harm[2] = [1e-6] * REGIONS
    small = round_to_budget([[1.0] * REGIONS] * LAYERS, costs, 0.97, harm)
    assert sum(small[2]) < 10 * REGIONS
    assert all(row == (10,) * REGIONS for layer, row in enumerate(small) if layer != 2)
    large = round_to_budget([[1.0] * REGIONS] * LAYERS, costs, 0.8, harm)
    assert all(sum(large[2]) < sum(row) for layer, row in enumerate(large) if layer != 2)


def test_a_slope_that_happens_to_be_zero_does_not_send_a_cell_far_from_its_ratio() -> None:
    costs = table_of()
    values = [[0.94] * REGIONS for _ in range(LAYERS)]
    harm = [[1.0] * REGIONS for _ in range(LAYERS)]
    harm[1][2] = 0.0
    table = round_to_budget(values, costs, costs.fraction(constant_table(LAYERS, REGIONS, 9)), harm)
    assert all(abs(bin_ - 9.4) < 1.5 for row in table for bin_ in row)


def test_first_within() -> None:
    costs = table_of()
    path = [constant_table(LAYERS, REGIONS, bin_) for bin_ in range(10, 0, -1)]
    exact = costs.fraction(path[4])
    assert first_within(path, costs, exact + 0.005, "rule") == path[4]
    with pytest.raises(BudgetUnreachable) as error:
        first_within(path, costs, exact + 0.03, "rule")
    assert error.value.reachable == (costs.fraction(path[-1]), 1.0)


@given(
    st.integers(1, 6).flatmap(
        lambda regions: st.lists(
            st.lists(st.integers(0, 10), min_size=regions, max_size=regions), min_size=1, max_size=6
        )
    ),
    st.floats(0.01, 1),
    st.integers(1, 128),
)
def test_json_round_trip(bins: list[list[int]], budget: float, alignment: int) -> None:
    schedule = KeepSchedule(tuple(map(tuple, bins)), RUN, budget, alignment)
    again = KeepSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert (again.layers, again.regions) == (len(bins), len(bins[0]))


GOOD = KeepSchedule(((10, 5), (3, 1)), RUN, 0.8).to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"bins": [[11]]},
        {"bins": [[-1]]},
        {"bins": [[2.5]]},
        {"bins": [[5.0]]},
        {"bins": [[True]]},
        {"bins": [["5"]]},
        {"bins": [[None]]},
        {"bins": [[float("nan")]]},
        {"bins": [[5, 5], [5]]},
        {"bins": []},
        {"bins": [[]]},
        {"bins": [[], []]},
        {"bins": 5},
        {"bins": [5]},
        {"bins": "10"},
        {"bins": None},
        {"bins": [[1]] * 5000},
        {"bins": [[1] * 5000]},
        {"budget": float("nan")},
        {"budget": 0},
        {"budget": -0.1},
        {"budget": 1.5},
        {"budget": "cheap"},
        {"budget": None},
        {"alignment": 0},
        {"alignment": 1.5},
        {"alignment": True},
        {"alignment": 10**9},
        {"run": None},
        {"run": {}},
    ],
)
def test_schedules_that_make_no_sense_are_refused(change: dict) -> None:
    KeepSchedule.from_json(GOOD)
    with pytest.raises(DiffratioError) as error:
        KeepSchedule.from_json(GOOD | change)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("document", [None, [], 3, "schedule", {}])
def test_documents_that_are_no_schedule_are_refused(document: object) -> None:
    with pytest.raises(DiffratioError, match="not a keep schedule"):
        KeepSchedule.from_json(document)


def test_kept_tokens() -> None:
    schedule = KeepSchedule(((10, 5, 3, 0),), RUN, 0.8, alignment=4)
    assert [schedule.kept(0, region, 64) for region in range(4)] == [64, 32, 20, 0]
    assert [schedule.kept(0, region, 10) for region in range(4)] == [10, 8, 4, 0]
