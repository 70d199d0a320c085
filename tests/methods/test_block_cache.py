"""Block caches: which steps skip which blocks, extrapolated residuals, and budgets."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from guided import dit, generate, noise

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.actions import Reuse, Skip
from diffratio.methods.intervals import computed, inner_blocks
from diffratio.surgery import attachment, describe
from diffratio.surgery.memory import StepMemory
from diffratio.tokens.grid import TokenGrid

GRID = TokenGrid(6, 6)
RUN = uniform_run(6, GRID)


def actions(layers: int = 4, run: SamplingRun = RUN, **settings: Any) -> list[Any]:
    config = diffratio.BlockCache(**settings)
    method = config.method(config, describe(dit(num_layers=layers)))
    return [method.action(step, run) for step in range(run.steps)]


def test_intervals_are_even() -> None:
    for every in (1, 2, 3, 7):
        assert [step for step in range(20) if computed(step, every)] == list(range(0, 20, every))
    for count in range(1, 21):
        places = [step for step in range(20) if computed(step, 20 / count)]
        gaps = {after - before for before, after in zip(places, [*places[1:], 20], strict=True)}
        assert len(places) == count and max(gaps) - min(gaps) <= 1
    assert [inner_blocks(layers) for layers in (1, 2, 3, 8)] == [(0, 0), (1, 1), (1, 1), (1, 6)]


def test_settings_say_what_each_step_does() -> None:
    skip = Skip(1, 2)
    assert actions() == [None, skip] * 3
    assert actions(every=3, extrapolate=True) == [None, Skip(1, 2, True), Skip(1, 2, True)] * 2
    assert actions(every=6, first=0, last=3) == [None, *[Skip(0, 3)] * 5]
    assert actions(every=6, first=0.25, last=0.5) == [None, *[Skip(1, 1)] * 5]
    assert actions(every=6, full_steps=(2, 5)) == [None, skip, None, skip, skip, None]
    assert actions(every=6, window=(0.3, 0.7)) == [None, None, skip, skip, skip, None]  # u = 4/6, 3/6, 2/6
    ends = actions(every=6, first=1, last=0.6, mix=True)[1:]  # 1.4 blocks in the mean, of 5 steps
    assert [one.last for one in ends].count(2) == 2 and [one.last for one in ends].count(1) == 3
    letters = [None, Skip(1, 2), Reuse(), None, Skip(1, 2, True), Reuse()]
    assert actions(actions="CXCCXR")[1:5] == [Reuse(True), None, None, Reuse(True)]
    assert actions(actions="CSRCER") == actions(actions=tuple("CSRCER")) == letters


@pytest.mark.parametrize("halves", ["one", "cond_first"])
def test_residuals_are_extrapolated_by_noise_level(halves: Any) -> None:
    """A residual that is linear in the noise level comes out exactly, whatever the steps."""
    one, start, slope = Skip(0, 1, True), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    memory, x = StepMemory((one, Skip(0, 1))), torch.randn(2, 4, 3)
    for number, level in enumerate((1.0, 0.8, 0.5)):
        memory.enter(0, (x,))
        memory.leave(1, (x + start + slope * level,), halves, level)
        if number == 0:  # alone it is used as it is
            (found,) = memory.skip(one, (x,), halves, 0.9)
            torch.testing.assert_close(found, x + start + slope * 1.0)
    memory.enter(0, (x,))
    memory.leave(1, (x + start + slope * 0.5,), halves, 0.5)  # the same step once more
    for level in (0.45, 0.1):
        (found,) = memory.skip(one, (x,), halves, level)
        torch.testing.assert_close(found, x + start + slope * level)
    (plain,) = memory.skip(Skip(0, 1), (x,), halves, 0.1)
    torch.testing.assert_close(plain, x + start + slope * 0.5)
    if halves == "cond_first":  # the conditional half of both
        (half,) = memory.skip(one, (x[:1],), "cond", 0.1)
        torch.testing.assert_close(half, (x + start + slope * 0.1)[:1])


CONFIGS: list[list[Any]] = [
    [diffratio.BlockCache(extrapolate=True)],
    [diffratio.BlockCache(3.0, first=0, last=1), diffratio.ToMe(ratio=0.5)],
    [diffratio.BlockCache(actions="CSRCER")],
    [diffratio.BlockCache(2.0), diffratio.SDTM()],
    [diffratio.BlockCache(2.0, window=(0.0, 0.7)), diffratio.DaTo(mode="prune")],
    [diffratio.BlockCache(2.0, extrapolate=True), diffratio.GuidanceInterval(skip=2)],
]


@pytest.mark.parametrize("configs", CONFIGS, ids=lambda one: "+".join(config.method.name for config in one))
def test_generations_repeat_cost_what_is_counted_and_leave_nothing(configs: list[Any]) -> None:
    x, transformer = noise(2), diffratio.apply_(dit(num_layers=4), configs)
    plain, first = generate(dit(num_layers=4), x), generate(transformer, x)
    assert first.isfinite().all() and not torch.allclose(first, plain, atol=1e-4)
    cost = diffratio.macs(transformer, run=RUN)
    assert cost.fraction < 1
    assert count_macs(transformer, lambda: generate(transformer, x)) == pytest.approx(2 * cost.total, rel=1e-3)
    generate(transformer, x.flip(0), steps=6)
    assert torch.equal(generate(transformer, x), first)
    diffratio.remove_(transformer)
    assert torch.equal(generate(transformer, x), plain)


def test_it_goes_on_top_of_a_routed_transformer() -> None:
    schedule = diffratio.KeepSchedule(((10, 5),) * 4, RUN, 0.9)
    transformer = diffratio.apply_(dit(num_layers=4), diffratio.DiffCR(schedule))
    routed = diffratio.macs(transformer, run=RUN).total
    diffratio.apply_(transformer, diffratio.BlockCache())
    assert [one.name for one in attachment(transformer).methods] == ["block_cache", "diffcr"]
    cost = diffratio.macs(transformer, run=RUN)
    assert cost.total < routed
    counted = count_macs(transformer, lambda: generate(transformer, noise(1)))
    assert counted == pytest.approx(cost.total - cost.planning, rel=1e-3)


def test_budgets_are_met_or_the_range_is_told() -> None:
    description, run = describe(dit(num_layers=8)), uniform_run(20, GRID)
    method = diffratio.BlockCache().method
    lowest = None
    for budget in (0.95, 0.8, 0.5, 0.3, 0.05):
        try:
            config: Any = method.for_budget(description, run, budget)
        except BudgetUnreachable as error:
            lowest = error.reachable[0]
            assert "one block in one of 20 steps" in str(error)
            continue
        assert budget - 0.01 <= method(config, description).macs(run).fraction <= budget
        full = [action for action in (method(config, description).action(step, run) for step in range(20)) if action]
        assert all(isinstance(one, Skip) and one.first == 1 and one.last <= 6 for one in full)
    assert lowest is not None and 0.05 < lowest < 0.2  # one step, and what surrounds the blocks
    least: Any = method.for_budget(description, run, lowest + 1e-9)
    assert least.first == 0 and method(least, description).macs(run).fraction == pytest.approx(lowest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0.9}, "block_cache: every 0.9 must be a number of at least 1"),
        ({"first": 1.5}, "first 1.5 is neither a block .* nor a fraction"),
        ({"last": -1}, "last -1 is neither a block"),
        ({"window": (0.7, 0.3)}, "window .* must be two noise levels"),
        ({"full_steps": (1, -2)}, "full_steps must be an integer of at least 0"),
        ({"actions": "RC"}, "action of step 0 is 'R' and must be C"),
        ({"actions": "CS", "full_steps": (1,)}, "leave window, full_steps and extrapolate out"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        diffratio.BlockCache(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 3, "last": 2}, "first 3 and last 2 leave no range in a model of 4 blocks; .* last <= 3"),
        ({"last": 4}, "last 4 leave no range in a model of 4 blocks"),
        ({"actions": "CS"}, "2 actions and the run has 6 steps; give one for each"),
        ({"full_steps": (6,)}, "full_steps 6 is none of the run's steps 0..5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        actions(**settings)


@pytest.mark.parametrize("backbone", ["sd3", "flux"])
def test_streams_of_text_are_cached_too(backbone: str) -> None:
    """Counted over a run of tiny models; two ranges cross both kinds of FLUX's blocks."""
    family = get_backbone(backbone)
    torch.manual_seed(0)
    transformer = diffratio.apply_(family.tiny().eval(), diffratio.BlockCache(first=0, last=1, extrapolate=True))
    run = replace(family.default_run(transformer, 4, "none"), text_tokens=5)
    state, total = attachment(transformer), 0
    state.open_run(run)
    for step, level in enumerate(run.noise_levels):
        state.step = step
        batch = family.example(transformer, 1, run=run)
        batch["timestep"] = family.timestep(torch.tensor([level]))
        total += count_macs(transformer, functools.partial(transformer, **batch))
    assert total == pytest.approx(diffratio.macs(transformer, run=run).total, rel=1e-3)
