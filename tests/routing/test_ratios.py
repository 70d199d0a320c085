"""Keep ratios: brackets, interpolation, projection onto a budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffratio.cost.macs import BlockCost, CostTable, Description, SiteCost, macs_table
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import DiffratioError
from diffratio.routing.ratios import Bracket, BudgetProjection, KeepRatios, bracket, budget_of, interpolated
from diffratio.tokens.grid import TokenGrid

LAYERS, REGIONS = 5, 4


def table_of(run: SamplingRun | None = None, tokens: int = 8, alignment: int = 1) -> CostTable:
    """Blocks of different widths, so that cells cost differently."""
    blocks = tuple(
        BlockCost((SiteCost("self_attention", 2 * d * d, 2 * d * d, 2 * d), SiteCost("feed_forward", 8 * d * d)), 6 * d)
        for d in (16, 24, 32, 24, 16)
    )
    description = Description("dit", 24, blocks, per_token=100, fixed=1000)
    return macs_table(description, run or uniform_run(20, TokenGrid(tokens, tokens)), alignment)


def ratios_of(values: list[list[float]]) -> KeepRatios:
    ratios = KeepRatios(len(values), len(values[0]))
    with torch.no_grad():
        ratios.rho.copy_(torch.tensor(values))
    return ratios


@pytest.mark.parametrize("bin_", range(2, 11))
def test_bracket_on_a_bin_looks_down(bin_: int) -> None:
    for ratio in (
        bin_ / 10,
        float(torch.tensor(bin_ / 10)),
        math.nextafter(bin_ / 10, 0),
        math.nextafter(bin_ / 10, 2),
    ):
        assert bracket(ratio) == Bracket(bin_ - 1, bin_, 1.0)


@pytest.mark.parametrize("ratio", [0.1, float(torch.tensor(0.1)), 0.0999, 0.0, -3.0])
def test_the_lowest_bracket_looks_up(ratio: float) -> None:
    assert bracket(ratio) == Bracket(1, 2, 0.0)


@pytest.mark.parametrize("ratio", [1.0, 1.00001, 1.1, 1.05, 7.0])
def test_beyond_one_is_one(ratio: float) -> None:
    """An optimizer step may leave the range before the projection brings the ratios back."""
    assert bracket(ratio) == Bracket(9, 10, 1.0)


def test_nan_is_an_error() -> None:
    with pytest.raises(DiffratioError, match="nan"):
        bracket(float("nan"))


@given(st.integers(1, 9), st.floats(0.001, 0.999))
def test_bracket_between_bins(lower: int, weight: float) -> None:
    at = bracket((lower + weight) / 10)
    assert (at.lower, at.upper) == (lower, lower + 1)
    assert at.weight == pytest.approx(weight, abs=1e-9)


@given(st.floats(0.1, 1))
def test_interpolated_cost_is_continuous_and_never_falls(ratio: float) -> None:
    row = table_of().cells[0]
    value, slope = interpolated(row, ratio)
    assert row[1] <= value <= row[10]
    assert slope > 0
    assert interpolated(row, min(1.0, ratio + 1e-6))[0] >= value - 1e-6 * row[10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_exact_in_value_with_slope_ten(dtype: torch.dtype) -> None:
    values = [[0.1, 0.3, 0.37, 1.0], [0.7, 0.95, 0.2, 0.6]]
    ratios = ratios_of(values).to(dtype)
    regions = torch.tensor([0, 1, 2, 3, 2, 0])
    for layer, row in enumerate(ratios.table()):
        brackets = [bracket(ratio) for ratio in row]
        weight = ratios.weight(layer, regions, brackets)
        assert weight.tolist() == torch.tensor([brackets[r].weight for r in regions], dtype=dtype).tolist()
        ratios.rho.grad = None
        weight.sum().backward()
        assert ratios.rho.grad is not None
        expected = torch.zeros(2, 4, dtype=dtype)
        expected[layer] = torch.tensor([20.0, 10.0, 20.0, 10.0])
        assert torch.equal(ratios.rho.grad, expected)


tables = st.lists(st.lists(st.floats(0.1, 1), min_size=REGIONS, max_size=REGIONS), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=30)
@given(tables)
def test_gradient_of_the_budget_is_a_difference_quotient(values: list[list[float]]) -> None:
    costs, nudge = table_of(), 1e-6
    # within a bin and away from its ends
    values = [[(math.floor(10 * v) + 0.5) / 10 if v < 1 else 0.95 for v in row] for row in values]
    _, gradient = budget_of(values, costs)
    for layer in range(LAYERS):
        for region in range(REGIONS):
            sides = []
            for sign in (1, -1):
                moved = [list(row) for row in values]
                moved[layer][region] += sign * nudge
                sides.append(budget_of(moved, costs)[0])
            assert gradient[layer][region] == pytest.approx((sides[0] - sides[1]) / (2 * nudge), rel=1e-4)


@settings(max_examples=60)
@given(tables, st.floats(0, 1))
def test_projection_lands_on_the_budget(values: list[list[float]], share: float) -> None:
    projection, ratios = BudgetProjection(table_of()), ratios_of(values)
    lowest = projection.lowest(LAYERS, REGIONS)
    target = lowest + share * (1 - lowest)
    reached = projection.project_(ratios, target)
    assert abs(projection.fraction(ratios) - target) < 1e-6
    assert abs(reached - target) < 1e-6
    assert ratios.rho.min() >= 0.1
    assert ratios.rho.max() <= 1


def test_projection_onto_the_budget_where_they_stand_changes_nothing() -> None:
    ratios = ratios_of([[0.3, 0.55, 0.72, 0.9]] * LAYERS)
    projection = BudgetProjection(table_of())
    before = ratios.rho.detach().clone()
    projection.project_(ratios, projection.fraction(ratios))
    torch.testing.assert_close(ratios.rho.detach(), before, atol=1e-6, rtol=0)


def test_projection_leaves_regions_alone_that_the_run_never_visits() -> None:
    run = SamplingRun((0.9, 0.8, 0.1), TokenGrid(8, 8))
    ratios, projection = ratios_of([[0.5] * REGIONS] * LAYERS), BudgetProjection(table_of(run))
    projection.project_(ratios, 0.8)
    assert torch.equal(ratios.rho[:, 1:3], torch.full((LAYERS, 2), 0.5))
    assert (ratios.rho[:, [0, 3]] > 0.5).all()


@pytest.mark.parametrize(("tokens", "alignment"), [(2, 1), (3, 1), (8, 16), (8, 32)])
def test_projection_where_neighbouring_bins_cost_the_same(tokens: int, alignment: int) -> None:
    """Few tokens, or an alignment: the cost is flat where the ratios start."""
    projection = BudgetProjection(table_of(uniform_run(20, TokenGrid(tokens, tokens)), alignment=alignment))
    ratios = KeepRatios(LAYERS, REGIONS)
    lowest = projection.lowest(LAYERS, REGIONS)
    for target in (0.5 * (lowest + 1), lowest + 0.01, 0.99):
        projection.project_(ratios, target)
        assert abs(projection.fraction(ratios) - target) < 1e-6


def test_projection_of_a_single_token_has_nothing_to_move() -> None:
    projection = BudgetProjection(table_of(uniform_run(20, TokenGrid(1, 1))))
    assert projection.project_(KeepRatios(LAYERS, REGIONS), 1.0) == 1.0


def test_a_target_below_the_lowest_is_refused() -> None:
    projection, ratios = BudgetProjection(table_of()), KeepRatios(LAYERS, REGIONS)
    with pytest.raises(DiffratioError, match=r"budget 0.01 is below 0\.\d+.*budget\.target"):
        projection.project_(ratios, 0.01)
    assert (ratios.rho == 1).all()


@settings(max_examples=60)
@given(tables, st.integers(0, 10_000))
def test_removed_component_is_orthogonal_to_the_cost(values: list[list[float]], seed: int) -> None:
    costs, ratios = table_of(), ratios_of(values)
    gradient = torch.randn(LAYERS, REGIONS, generator=torch.Generator().manual_seed(seed))
    ratios.rho.grad = gradient.clone()
    BudgetProjection(costs).remove_component_(ratios)
    normal = torch.tensor(budget_of(ratios.table(), costs)[1])
    tangent = ratios.rho.grad
    assert abs((tangent * normal).sum()) <= 1e-4 * gradient.norm() * normal.norm()
    rho = ratios.rho.detach()
    assert not ((rho >= 1) & (tangent < 0)).any()  # nothing pushes against a bound
    assert not ((rho <= 0.1) & (tangent > 0)).any()
    assert (tangent * gradient).sum() >= -1e-5  # still downhill


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_what_rounding_leaves_is_no_gradient(seed: int) -> None:
    """All at 1, the cost allows no move: Adam would make a whole step of a rounding error, and it has any sign."""
    ratios = KeepRatios(LAYERS, REGIONS)
    ratios.rho.grad = 0.03 * torch.randn(LAYERS, REGIONS, generator=torch.Generator().manual_seed(seed))
    BudgetProjection(table_of()).remove_component_(ratios)
    assert (ratios.rho.grad == 0).all()


def test_no_gradient_is_left_as_none() -> None:
    ratios = KeepRatios(LAYERS, REGIONS)
    BudgetProjection(table_of()).remove_component_(ratios)
    assert ratios.rho.grad is None


def test_clamped_ratios_come_back() -> None:
    """A cell at 1 returns as soon as its gradient says so; a clamp in the forward pass would hold it there."""
    costs = table_of()
    projection, ratios = BudgetProjection(costs), ratios_of([[1.0] * REGIONS] + [[0.6] * REGIONS] * (LAYERS - 1))
    target = projection.fraction(ratios)
    optimizer = torch.optim.SGD(ratios.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        ratios.rho.grad = torch.zeros(LAYERS, REGIONS)
        ratios.rho.grad[0] = 1.0  # keeping more tokens in the first block harms
        projection.remove_component_(ratios)
        optimizer.step()
        projection.project_(ratios, target)
        assert abs(projection.fraction(ratios) - target) < 1e-6
    assert (ratios.rho[0] < 0.9).all()
    assert (ratios.rho[1:] > 0.6).all()
