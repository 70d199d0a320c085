"""Budgets in milliseconds: every solver keeps to the bins that pay, and to the budget."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from cost_tables import STEP, STEP_BINS, latency_table
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allocate import model_of, random_deltas

from diffratio.cost.macs import ALL_BINS, CostTable, tokens_of_bin
from diffratio.cost.run import uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.routing.allocate import Path, allocate
from diffratio.routing.ratios import BudgetProjection, KeepRatios, budget_of
from diffratio.routing.schedule import KeepSchedule, Table, constant_table, finer_within, moved, raised, round_to_budget
from diffratio.tokens.grid import TokenGrid

LAYERS, REGIONS = 6, 4
RUN = uniform_run(20, TokenGrid(8, 8))
# any times at all, as a loaded machine gives them
rows = st.lists(st.floats(0.0, 12.0), min_size=10, max_size=10).map(lambda row: (*row, 10.0))
tables = st.lists(st.lists(st.floats(0.1, 1), min_size=REGIONS, max_size=REGIONS), min_size=LAYERS, max_size=LAYERS)


def costs_of(row: tuple[float, ...] = STEP, layers: int = LAYERS) -> CostTable:
    costs = latency_table(row, layers, side=8).costs(RUN)
    assert isinstance(costs, CostTable)
    return costs


def used(table: Table) -> set[int]:
    return {bin_ for row in table for bin_ in row}


@settings(max_examples=60)
@given(rows, tables, st.floats(0.05, 1), st.one_of(st.none(), tables))
def test_rounding_keeps_to_paying_bins_and_never_costs_more(
    row: tuple[float, ...], values: list[list[float]], budget: float, harm: list[list[float]] | None
) -> None:
    costs = costs_of(row)
    lowest = costs.fraction(constant_table(LAYERS, REGIONS, costs.levels[0]))
    if budget < lowest:
        with pytest.raises(BudgetUnreachable):
            round_to_budget(values, costs, budget, harm)
        return
    table = round_to_budget(values, costs, budget, harm)
    assert used(table) <= set(costs.levels)
    assert costs.fraction(table) <= budget <= 1.0
    if costs.fraction(table) < budget - 0.01:  # then no cell has room for its next bin
        for layer, bins in enumerate(table):
            for region, bin_ in enumerate(bins):
                higher = [level for level in costs.levels if level > bin_]
                if higher and RUN.region_counts(REGIONS)[region]:
                    assert costs.fraction(moved(table, (layer, region), higher[0] - bin_)) > budget


@settings(max_examples=30)
@given(tables, st.floats(0.35, 1))
def test_rounding_on_a_stepped_table_lies_within_the_budget(values: list[list[float]], budget: float) -> None:
    costs = costs_of()
    table = round_to_budget(values, costs, budget)
    assert used(table) <= set(STEP_BINS) - {0}
    assert costs.fraction(table) <= budget
    if any(1 < bin_ < 6 for row in table for bin_ in row):  # single bins are then fine enough
        assert costs.fraction(table) >= budget - 0.01


@settings(max_examples=60)
@given(rows, tables, st.floats(0.1, 1))
def test_the_projection_meets_the_target(row: tuple[float, ...], values: list[list[float]], target: float) -> None:
    costs = costs_of(row)
    ratios, projection = KeepRatios(LAYERS, REGIONS), BudgetProjection(costs)
    with torch.no_grad():
        ratios.rho.copy_(torch.tensor(values))
    if target < projection.lowest(LAYERS, REGIONS):
        with pytest.raises(DiffratioError, match="cost of this model with every keep ratio"):
            projection.project_(ratios, target)
        return
    if costs.levels == (10,):  # nothing pays: there is nothing to move
        assert projection.lowest(LAYERS, REGIONS) == 1.0
        return
    assert projection.project_(ratios, target) == pytest.approx(target, abs=1e-6)
    assert projection.fraction(ratios) == pytest.approx(target, abs=1e-6)
    dense = latency_table(row, LAYERS, side=8).run_ms(RUN)
    assert projection.fraction(ratios) * dense == pytest.approx(target * dense, rel=1e-6 / target)
    assert ratios.rho.min() >= 0.0999 and ratios.rho.max() <= 1.0001


def test_ratios_learn_where_bins_do_not_pay_too() -> None:
    """Flat costs would leave ratios between 0.6 and 1 without gradient along the budget."""
    ratios, projection = KeepRatios(LAYERS, REGIONS), BudgetProjection(costs_of())
    projection.project_(ratios, 0.85)
    assert min(map(min, ratios.table())) > 0.7 and max(map(max, ratios.table())) < 0.95
    ratios.rho.grad = torch.randn(LAYERS, REGIONS)
    projection.remove_component_(ratios)
    normal = torch.tensor(budget_of(ratios.table(), projection.costs)[1])
    assert (normal > 0).all() and (ratios.rho.grad.abs() > 0).all()
    assert float((normal * ratios.rho.grad).sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("interactions", [True, False])
@pytest.mark.parametrize("budget", [0.9, 0.7, 0.4])
def test_allocation_keeps_to_paying_bins(budget: float, interactions: bool) -> None:
    model, costs = model_of(random_deltas(1, LAYERS, REGIONS)), costs_of()
    table = allocate(model, costs, budget, interactions=interactions)
    assert used(table) <= set(STEP_BINS)
    assert budget - 0.01 <= costs.fraction(table) <= budget


def test_allocation_of_many_cells_moves_between_neighbouring_allowed_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[allocate.__module__], "_MOST_MOVES", 50)
    regions = 5  # more moves than are all tried
    model, costs = model_of(random_deltas(2, 8, regions)), costs_of(layers=8)
    table = allocate(model, costs, 0.7)
    assert used(table) <= set(STEP_BINS) and 0.69 <= costs.fraction(table) <= 0.7
    uniform = round_to_budget([[0.68] * regions] * 8, costs, 0.7)
    assert model.error(table) < model.error(uniform)


def test_a_ceiling_that_does_not_pay_is_lowered() -> None:
    model = model_of(random_deltas(3, LAYERS, REGIONS))
    table = allocate(model, costs_of(), 0.99, ceiling=constant_table(LAYERS, REGIONS, 8))
    assert max(used(table)) == 6


def test_paths_raise_bins_that_do_not_pay() -> None:
    cells = tuple((layer, region) for _ in range(10) for layer in range(LAYERS) for region in reversed(range(REGIONS)))
    path, costs = Path(LAYERS, REGIONS, cells, tuple(float(at + 1) for at in range(len(cells)))), costs_of()
    for budget in (0.9, 0.75, 0.5):
        table, error = path.within(costs, budget)
        assert used(table) <= set(STEP_BINS) and budget - 0.01 <= costs.fraction(table) <= budget
        assert 3 * LAYERS * REGIONS < error < len(cells)  # three decrements of every cell save nothing


def test_one_coarse_move_is_made_in_a_part_of_its_region() -> None:
    costs = costs_of(layers=2)
    path = [constant_table(2, 1), moved(constant_table(2, 1), (0, 0), -4), constant_table(2, 1, 6)]
    table, place = finer_within(path, costs, 0.9, "rule")
    assert 0.89 <= costs.fraction(table) <= 0.9 and 0 < place < 1 and used(table) == {6, 10}
    assert table[1] == (10,) * len(table[0]) and table[0][-1] == 6  # noisiest part first
    assert table[0].count(6) / len(table[0]) == pytest.approx(place)
    with pytest.raises(BudgetUnreachable):
        finer_within(path, costs, 0.3, "rule")


def test_raised() -> None:
    assert raised(((0, 3, 7), (6, 9, 10)), STEP_BINS) == ((0, 3, 10), (6, 10, 10))
    assert raised(((0, 3, 7),), (10,)) == ((10, 10, 10),)


def test_schedules_hold_unit_alignment_and_bins() -> None:
    costs = latency_table(layers=2, side=8, alignment=8).costs(RUN)
    schedule = KeepSchedule.solved(((10, 6), (0, 3)), costs, 0.6)
    assert (schedule.unit, schedule.alignment, schedule.allowed_bins) == ("latency", 8, STEP_BINS)
    document = json.loads(json.dumps(schedule.to_json()))
    assert KeepSchedule.from_json(document) == schedule and hash(KeepSchedule.from_json(document)) == hash(schedule)
    assert schedule.kept(0, 1, 64) == tokens_of_bin(6, 64, 8) == 40


def test_schedules_of_before_still_load() -> None:
    old = {"bins": [[10, 7]], "run": RUN.to_json(), "budget": 0.8, "alignment": 1}
    schedule = KeepSchedule.from_json(old)
    assert (schedule.unit, schedule.allowed_bins) == ("macs", ALL_BINS) and schedule.to_json() == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allowed_bins": [6, 10]}, "bin 0 is used and not in allowed_bins [6, 10]"),
        ({"allowed_bins": [0, 3, 6]}, "10 among them"),
        ({"allowed_bins": "10"}, "must be rising integers"),
        ({"allowed_bins": None}, "must be rising integers"),
        ({"unit": "seconds"}, "unknown unit of a keep schedule 'seconds'"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(change: dict[str, object], message: str) -> None:
    document = KeepSchedule(((10, 6), (0, 3)), RUN, 0.6).to_json()
    with pytest.raises(DiffratioError) as caught:
        KeepSchedule.from_json(document | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_dense_table_is_all_that_is_left_where_nothing_pays() -> None:
    costs = costs_of((math.pi,) * 10 + (3.0,))
    assert costs.levels == (10,)
    assert round_to_budget([[0.5] * REGIONS] * LAYERS, costs, 1.0) == constant_table(LAYERS, REGIONS)
    with pytest.raises(BudgetUnreachable, match="costs 1.000 to 1.000"):
        round_to_budget([[0.5] * REGIONS] * LAYERS, costs, 0.9)
