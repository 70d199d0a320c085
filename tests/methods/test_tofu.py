"""Token fusion: who drops, who merges, and what a merge keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guided import context, dit, generate, noise

import diffratio
from diffratio.errors import DiffratioError
from diffratio.methods.tofu import ToFuMethod
from diffratio.methods.tome import ToMeMethod
from diffratio.surgery import describe
from diffratio.tokens.plan import KeepPlan, NormMergePlan


def plans_of(config: diffratio.ToFu, step: int = 0) -> list[Any]:
    method = ToFuMethod(config, describe(dit(num_layers=4)))
    x = torch.randn(2, 36, 16, generator=torch.Generator().manual_seed(1))
    method.begin_step(context(step))
    plans = []
    for layer in range(4):
        method.plan(layer, "block", x, context(step))
        plans.append(method.plan(layer, "self_attention", x, context(step)))
    return plans


@pytest.mark.parametrize(("switch", "drops"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_first_blocks_drop_and_the_rest_merge(switch: float, drops: int) -> None:
    plans = plans_of(diffratio.ToFu(0.5, switch=switch))
    assert [type(plan) for plan in plans] == [KeepPlan] * drops + [NormMergePlan] * (4 - drops)


@pytest.mark.parametrize(("step", "kind"), [(0, KeepPlan), (2, KeepPlan), (3, NormMergePlan), (5, NormMergePlan)])
def test_the_switch_may_count_steps(step: int, kind: type) -> None:
    assert {type(plan) for plan in plans_of(diffratio.ToFu(0.5, over="steps"), step)} == {kind}


def test_its_matching_is_that_of_tome() -> None:
    """Dropped or merged, the groups are the same, and a dropped token copies its destination's result."""
    x = torch.randn(2, 36, 16)
    theirs = ToMeMethod(diffratio.ToMe(0.5), describe(dit()))
    theirs.begin_step(context(0))
    theirs.plan(0, "block", x, context(0))
    tome: Any = theirs.plan(0, "self_attention", x, context(0))
    for switch in (0.0, 1.0):
        ours = ToFuMethod(diffratio.ToFu(0.5, switch=switch), describe(dit()))
        ours.begin_step(context(0))
        ours.plan(0, "block", x, context(0))
        plan: Any = ours.plan(0, "self_attention", x, context(0))
        assert torch.equal(plan.index, tome.index)
        assert torch.equal(plan.slots if switch == 0 else plan.fill, tome.slots)
        reduced = plan.reduce(x)
        if switch == 1:
            assert torch.equal(reduced, tome.take(x))  # destinations and unmerged tokens as they are
            assert torch.equal(plan.restore(reduced, x), tome.restore(reduced, x))


def test_dropping_everywhere_merging_everywhere_and_tome_differ() -> None:
    x = noise()
    configs = [diffratio.ToFu(0.6, switch=switch) for switch in (0.0, 0.34, 1.0)] + [diffratio.ToMe(0.6)]
    results = [generate(diffratio.apply_(dit(), config), x) for config in configs]
    for i, one in enumerate(results):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in results[:i])


@pytest.mark.parametrize("settings", [{"switch": 1.5}, {"switch": -0.1}, {"over": "layers"}])
def test_bad_settings_are_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(DiffratioError, match="tofu") as caught:
        diffratio.ToFu(0.5, **settings)
    assert "\n" not in str(caught.value)
