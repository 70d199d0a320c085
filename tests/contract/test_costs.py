"""Analytic MACs against a counter, and budgets that are met."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract_table import (
    ALL_ROWS,
    CASES,
    GRID,
    IDS,
    RUN,
    Row,
    applied,
    forward,
    in_run,
    inputs,
    pairs_halves,
    run_of,
    transformer_of,
)

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods import MethodConfig, get_method, methods
from diffratio.methods.routed import RoutedMethod
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid

each_case = pytest.mark.parametrize(("row", "backbone"), CASES, ids=IDS)


def counted(transformer: torch.nn.Module, run: SamplingRun, steps: list[int] | None = None) -> int:
    """MACs of matrix products and convolutions in a whole run (or some of its steps), one sample, equal halves."""
    total, name = 0, backbone_of(transformer).name
    in_run(transformer, run, 0)  # one run: steps may stand on what earlier ones stored
    for step, level in enumerate(run.noise_levels):
        if steps is not None and step not in steps:
            continue
        attachment(transformer).step = step
        once = count_macs(transformer, lambda level=level: forward(transformer, inputs((level,), backbone=name)))
        total += (1 if pairs_halves(transformer) else run.halves) * once
    return total


def counted_by_half(transformer: torch.nn.Module, run: SamplingRun) -> int:
    """The same with a forward for each guidance half that is evaluated."""
    state, total = attachment(transformer), 0
    for step in range(run.steps):
        for half in ("cond", "uncond")[: run.halves_at(step)]:
            state.halves = half
            total += counted(transformer, run, [step]) // run.halves
    return total


@each_case
def test_analytic_macs_are_the_counted_macs(row: Row, backbone: str) -> None:
    transformer = applied(row, backbone)
    reference = run_of(backbone)
    run = attachment(transformer).adapt(reference)
    count = counted_by_half if row.halves else counted
    found = count(transformer, run)  # first, so that a cost that is measured is that of this very run
    cost = diffratio.macs(transformer, run=reference)
    # ranking is a matrix-vector product or less, which the counter leaves out; a matching is a matrix product
    uncounted = cost.planning if isinstance(attachment(transformer).token_method, RoutedMethod) else 0
    assert found == pytest.approx(cost.total - uncounted, rel=1e-3)
    assert cost.dense == diffratio.macs(transformer_of(backbone), run=reference).total
    outside = run.forwards * describe(transformer).outer(GRID.tokens, run.text_tokens)
    assert sum(cost.per_block) + outside == cost.total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 3, "num_layers": 2},
        {"sample_size": 12, "in_channels": 4, "out_channels": 8},
        {"patch_size": 4, "num_embeds_ada_norm": 3},
    ],
)
def test_dense_macs_follow_the_configuration(changes: dict) -> None:
    transformer = transformer_of("dit", **changes)
    config = transformer.config
    batch = {
        "hidden_states": torch.randn(1, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.tensor([500.0]),
        "class_labels": torch.tensor([1]),
    }
    count = count_macs(transformer, lambda: forward(transformer, batch))
    assert count == diffratio.macs(transformer, steps=1, guidance=False).total


def test_linear_only_leaves_the_pairs_out() -> None:
    method = get_method("dense")(diffratio.Dense(), describe(transformer_of("dit")))
    tokens, width, layers = 16, 16, 3
    pairs = RUN.steps * 2 * layers * 2 * tokens**2 * width
    assert method.macs(RUN).total - method.macs(RUN, linear_only=True).total == pairs


def test_methods_that_compose_cost_both() -> None:
    transformer = diffratio.apply_(transformer_of("dit"), [diffratio.FewerSteps(0.5), diffratio.ToMe(ratio=0.5)])
    alone = diffratio.apply_(transformer_of("dit"), diffratio.ToMe(ratio=0.5))
    both, tome = diffratio.macs(transformer, run=RUN), diffratio.macs(alone, run=RUN)
    assert 2 * both.total == tome.total
    assert both.dense == tome.dense


GRID8 = TokenGrid(8, 8)
PRICED = [name for name in methods() if get_method(name).static]  # the others are run, not described
KNOBS = [name for name in methods() if name not in ("dense", "diffcr", "measured")]


MEDIUM = {"num_layers": 8, "sample_size": 16, "num_attention_heads": 4, "attention_head_dim": 16}


@pytest.fixture(scope="module", params=ALL_ROWS)
def medium(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Eight layers, 8x8 tokens, width 64."""
    return get_backbone(request.param).tiny(**MEDIUM)


def medium_run(transformer: torch.nn.Module, steps: int) -> SamplingRun:
    """A uniform run of it, with the text tokens of `inputs`."""
    return replace(
        run_of(backbone_of(transformer).name), grid=GRID8, noise_levels=uniform_run(steps, GRID8).noise_levels
    )


@pytest.mark.parametrize("steps", [20, 7])
@pytest.mark.parametrize("budget", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("name", PRICED)
def test_for_budget_lands_or_says_what_is_reachable(
    medium: torch.nn.Module, name: str, budget: float, steps: int
) -> None:
    run = medium_run(medium, steps)
    try:
        config = diffratio.for_budget(name, medium, budget, run=run)
    except BudgetUnreachable as error:
        low, high = error.reachable
        assert name not in ("mod", "hand", "random_keep", "block_drop")
        assert f"{budget:g}" in str(error)
        assert 0 < low <= high
        if name == "block_cache":  # whole blocks of whole steps: no part of the 6 inner ones in `steps` steps is near
            units = [1 - count * (1 - low) / (8 * (steps - 1)) for count in range(8 * (steps - 1) + 1)]
            assert not any(budget - 0.01 <= one <= budget for one in units)
        elif low <= budget <= high:  # inside: only whole steps, too coarse
            whole = {"fewer_steps": range(1, steps + 1), "guidance_interval": range(steps, 2 * steps + 1)}[name]
            assert not any(budget - 0.01 <= count / max(whole) <= budget for count in whole)
        if name in KNOBS:  # both ends are met by asking for them
            for end in (low, min(high, 1.0)):
                reached = diffratio.for_budget(name, medium, min(1.0, end + 1e-9), run=run)
                assert end - 0.01 <= _fraction(medium, reached, run) <= end + 1e-6
        return
    fraction = _fraction(medium, config, run)
    assert budget - 0.01 <= fraction <= budget + 1e-9


def _fraction(transformer: torch.nn.Module, config: MethodConfig, run: SamplingRun) -> float:
    return config.method(config, describe(transformer)).macs(run).fraction


@pytest.mark.parametrize("name", PRICED)
def test_a_budget_of_one_is_dense(medium: torch.nn.Module, name: str) -> None:
    run = medium_run(medium, 20)
    assert _fraction(medium, diffratio.for_budget(name, medium, 1.0, run=run), run) == 1.0


SOLVED = ("mod", "hand", "tome", "tofu", "sdtm", "sdtm_cached", "importance", "random_keep", "block_drop", "dato")


@pytest.mark.parametrize("name", SOLVED)
def test_the_solved_config_is_what_runs(medium: torch.nn.Module, name: str) -> None:
    run = medium_run(medium, 4)
    config = diffratio.for_budget(name, medium, 0.7, run=run)
    backbone = backbone_of(medium)
    twin = backbone.tiny(**MEDIUM).eval()
    diffratio.apply_(twin, config)
    total = 0
    in_run(twin, run, 0)
    for step, level in enumerate(run.noise_levels):
        attachment(twin).step = step
        batch = inputs((level,), backbone=backbone.name) | {"hidden_states": torch.randn(1, 1, 16, 16)}
        once = count_macs(twin, lambda batch=batch: forward(twin, batch))
        total += (1 if pairs_halves(twin) else run.halves) * once
    cost = diffratio.macs(twin, run=run)
    assert total == pytest.approx(cost.total - (cost.planning if get_method(name).learned else 0), rel=1e-3)


@pytest.mark.parametrize("name", list(methods()))
@pytest.mark.parametrize("budget", [0, -0.5, 1.0001, float("nan"), True, "0.8"])
def test_budgets_outside_their_range_are_refused(medium: torch.nn.Module, name: str, budget: object) -> None:
    with pytest.raises(DiffratioError, match=r"budget .* is outside \(0, 1\]"):
        diffratio.for_budget(name, medium, budget)  # type: ignore[arg-type]


def test_uneven_runs_are_budgeted_by_their_own_steps(medium: torch.nn.Module) -> None:
    """SD3's shift puts most steps at noisy levels, where the rule cuts."""
    even = medium_run(medium, 20)
    run = replace(even, noise_levels=tuple(3 * u / (1 + 2 * u) for u in even.noise_levels))
    config = diffratio.for_budget("hand", medium, 0.8, run=run)
    assert 0.79 <= _fraction(medium, config, run) <= 0.8
    assert _fraction(medium, config, even) > 0.81  # another run, another cost
