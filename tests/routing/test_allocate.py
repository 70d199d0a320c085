"""Allocation on an error model: exact, never above the budget, aware of interactions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffratio.backbones import get_backbone
from diffratio.cost.macs import CostTable, macs_table
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.routing.allocate import ErrorModel, Path, allocate, knapsack, ordered, walk
from diffratio.routing.schedule import Table, constant_table
from diffratio.tokens.grid import TokenGrid

LAYERS, REGIONS = 4, 2
RUN = uniform_run(8, TokenGrid(4, 4))
# ten units a block and a unit a bin: costs that the programme represents exactly
LINEAR = CostTable(tuple(tuple(float(bin_) for bin_ in range(11)) for _ in range(LAYERS)), 0.0, 10.0 * LAYERS, RUN)


def model_of(deltas: torch.Tensor, base: Table | None = None, away: torch.Tensor | None = None) -> ErrorModel:
    """From changes of the output (R, L, 11, D) and the base's own difference from dense (R, D)."""
    regions, layers, _, size = deltas.shape
    flat = deltas.double().flatten(1, 2)
    away = torch.zeros(regions, size, dtype=torch.float64) if away is None else away
    return ErrorModel(
        base or constant_table(layers, regions),
        flat @ flat.transpose(1, 2),
        (flat @ away[..., None])[..., 0],
        away.square().sum(1),
        torch.ones(regions, dtype=torch.float64),
    )


def random_deltas(seed: int, layers: int = LAYERS, regions: int = REGIONS, size: int = 6) -> torch.Tensor:
    """Changes that grow as bins fall, in a direction that turns slowly; none at bin 10."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(regions, layers, 1, size, generator=generator, dtype=torch.float64)
    direction = direction + 0.2 * torch.randn(regions, layers, 11, size, generator=generator, dtype=torch.float64)
    return direction * (10 - torch.arange(11))[:, None] / 10


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 7)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.integers(0, 25),
)
def test_the_programme_equals_brute_force(groups: list[list[tuple[int, int]]], capacity: int) -> None:
    width = max(map(len, groups))
    values = torch.tensor([[float(v) for v, _ in g] + [math.inf] * (width - len(g)) for g in groups])
    costs = [[c for _, c in g] + [99] * (width - len(g)) for g in groups]
    best = min(
        (sum(v for v, _ in choice) for choice in itertools.product(*groups) if sum(c for _, c in choice) <= capacity),
        default=None,
    )
    found = knapsack(values, costs, capacity)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert sum(costs[g][option] for g, option in enumerate(found)) <= capacity
    assert sum(groups[g][option][0] for g, option in enumerate(found)) == best


def test_the_diagonal_is_solved_exactly_and_interactions_come_close() -> None:
    """Three blocks, one region: all 1,331 tables are looked at."""
    costs = CostTable(LINEAR.cells[:3], 0.0, 30.0, RUN)
    tables = [tuple((bin_,) for bin_ in bins) for bins in itertools.product(range(11), repeat=3)]
    for seed in range(2):
        model = model_of(random_deltas(seed, layers=3, regions=1))
        singles = model.singles()[0].tolist()
        diagonal = {t: sum(row[t[layer][0]] for layer, row in enumerate(singles)) for t in tables}
        errors = {t: model.error(t) for t in tables}
        for budget in (0.9, 0.6, 0.3):
            allowed = [t for t in tables if costs.fraction(t) <= budget]
            exact = allocate(model, costs, budget, interactions=False)
            assert diagonal[exact] == pytest.approx(min(diagonal[t] for t in allowed))
            assert errors[allocate(model, costs, budget)] <= 1.02 * min(errors[t] for t in allowed)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.05, 1), st.booleans(), st.sampled_from(["linear", "macs", "ms"]))
def test_the_budget_is_never_exceeded(seed: int, budget: float, interactions: bool, unit: str) -> None:
    costs = LINEAR
    if unit != "linear":
        backbone = get_backbone("dit")
        costs = macs_table(backbone.describe(TINY), RUN)
    if unit == "ms":  # measured times are no multiples of anything
        cells = tuple(tuple(0.1 + math.sqrt(2) * value / 1e4 for value in row) for row in costs.cells)
        costs = CostTable(cells, 0.3, 0.3 + sum(row[-1] for row in cells), RUN)
    model = model_of(random_deltas(seed))
    try:
        table = allocate(model, costs, budget, interactions=interactions)
    except BudgetUnreachable as error:
        assert budget < error.reachable[0] == pytest.approx(costs.fraction(constant_table(LAYERS, REGIONS, 0)))
        return
    assert costs.fraction(table) <= budget
    if unit == "linear":  # a bin of a cell is 1.25 %
        assert costs.fraction(table) >= budget - 0.0125 - 1e-9


TINY = get_backbone("dit").tiny(num_layers=LAYERS)


def test_predicted_error_is_the_square_of_the_sum() -> None:
    deltas, generator = random_deltas(1), torch.Generator().manual_seed(2)
    base = ((7, 5), (10, 6), (3, 9), (8, 8))
    for layer, row in enumerate(base):
        for region, bin_ in enumerate(row):
            deltas[region, layer] -= deltas[region, layer, bin_].clone()
    away = torch.randn(REGIONS, 6, generator=generator, dtype=torch.float64)
    model = model_of(deltas, base, away)
    for table in (base, ((1, 2), (3, 4), (5, 6), (7, 8))):
        outputs = [away[r] + sum(deltas[r, la, row[r]] for la, row in enumerate(table)) for r in range(REGIONS)]
        expected = sum(float(output.square().sum()) for output in outputs)
        assert model.error(table) == pytest.approx(expected, rel=1e-12)
    assert model.error(base) == pytest.approx(float(away.square().sum()), rel=1e-12)
    assert model.weighted((2.0, 0.0)).error(base) == pytest.approx(2 * float(away[0].square().sum()))


def test_a_useless_block_goes_first() -> None:
    deltas = random_deltas(3)
    deltas[:, 2] = 0
    table = allocate(model_of(deltas), LINEAR, 0.75)
    assert table == ((10, 10), (10, 10), (0, 0), (10, 10))
    path = walk(lambda _: model_of(deltas), model_of(deltas), LINEAR, (0.9, 0.8, 0.7))
    assert {layer for layer, _ in path.cells[:20]} == {2}


def test_cells_that_cancel_go_together_with_the_gram_and_not_without() -> None:
    """Blocks 0 and 1 matter most alone, and nothing together."""
    size = 6
    deltas = torch.zeros(1, LAYERS, 11, size, dtype=torch.float64)
    fall = (10 - torch.arange(11)).double()
    deltas[0, 0, :, 0], deltas[0, 1, :, 0] = 3 * fall, -3 * fall
    deltas[0, 2, :, 1], deltas[0, 3, :, 2] = fall, fall
    model = model_of(deltas)
    table = allocate(model, LINEAR, 0.5)
    assert table == ((0,), (0,), (10,), (10,)) and model.error(table) == 0
    alone = allocate(model, LINEAR, 0.5, interactions=False)
    assert min(alone[0][0], alone[1][0]) >= 8 and max(alone[2][0], alone[3][0]) <= 2


def test_regions_without_steps_stay_as_they_are() -> None:
    noisy = SamplingRun((0.95, 0.9, 0.8, 0.6), TokenGrid(4, 4))
    costs = CostTable(LINEAR.cells, 0.0, LINEAR.dense, noisy)
    table = allocate(model_of(random_deltas(0)), costs, 0.5)
    assert all(row[0] == 10 for row in table)
    assert 0.48 <= costs.fraction(table) <= 0.5


def test_a_ceiling_is_kept() -> None:
    ceiling = ((10, 4), (7, 10), (9, 9), (2, 10))
    table = allocate(model_of(random_deltas(5)), LINEAR, 0.6, ceiling)
    assert all(
        bin_ <= top for row, tops in zip(table, ceiling, strict=True) for bin_, top in zip(row, tops, strict=True)
    )
    assert 0.58 <= LINEAR.fraction(table) <= 0.6


def test_decrements_lead_from_one_table_to_the_other() -> None:
    model = model_of(random_deltas(6))
    start, end = constant_table(LAYERS, REGIONS), ((10, 4), (7, 10), (9, 0), (2, 10))
    cells, errors = ordered(model, LINEAR, start, end)
    path = Path(LAYERS, REGIONS, tuple(cells), tuple(errors))
    tables = list(path.tables())
    assert (tables[0], tables[-1]) == (start, end)
    assert errors == [model.error(table) for table in tables[1:]]
    fractions = [LINEAR.fraction(table) for table in tables]
    assert fractions == sorted(fractions, reverse=True)


def test_a_walk_serves_every_budget_and_measures_around_what_it_reached() -> None:
    deltas, seen = random_deltas(7), []

    def measure(table: Table) -> ErrorModel:
        seen.append(table)
        return model_of(deltas)

    path = walk(measure, model_of(deltas), LINEAR, (0.8, 0.6, 0.4))
    tables = list(path.tables())
    assert all(table in tables for table in seen) and len(seen) == 2
    for budget in (1.0, 0.95, 0.8, 0.71, 0.55, 0.41):
        table, error = path.within(LINEAR, budget)
        assert budget - 0.01 <= LINEAR.fraction(table) <= budget
        assert (error == 0) == (table == tables[0])
    # a decrement of 1.56 %, too coarse for a budget just below its start: it is made in a half of its region
    fractions = [LINEAR.fraction(table) for table in tables]
    place = next(at for at, (a, b) in enumerate(itertools.pairwise(fractions)) if a - b > 0.012)
    table, error = path.within(LINEAR, fractions[place] - 0.001)
    assert len(table[0]) > REGIONS and fractions[place] - 0.011 <= LINEAR.fraction(table) <= fractions[place] - 0.001
    low, high = sorted((0.0, *path.errors)[place : place + 2])
    assert low < error < high
    with pytest.raises(BudgetUnreachable) as caught:
        path.within(LINEAR, 0.3)
    assert caught.value.reachable[1] == 1.0


def test_paths_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DiffratioError, match="decrements"):
        Path(1, 1, ((0, 0),), ())
    with pytest.raises(DiffratioError, match="below bin 0"):
        Path(1, 1, ((0, 0),) * 11, (0.0,) * 11)
