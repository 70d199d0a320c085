"""Importance-based merging against its definition, written out naively."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guided import context, dit, generate, guided_forward, noise
from torch import Tensor

import diffratio
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.methods.importance import ImportanceMethod
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.plan import KeepPlan, MergePlan

Importance = diffratio.Importance
BOTH = ("self_attention", "feed_forward")


def plan_after(config: Any, importance: Tensor, x: Tensor, step: int = 6, **changes: Any) -> Any:
    """The plan of a step whose predecessor left that importance."""
    method = ImportanceMethod(config, describe(dit(num_layers=4)))
    ctx = context(step, steps=12, halves="cond_first", **changes)
    method.carried.at, method.carried.next = step - 1, importance
    method.begin_step(ctx)
    assert method.plan(1, "block", x, ctx) is None
    return method.plan(1, "self_attention", x, ctx)


def test_importance_is_the_mean_difference_of_the_halves_by_token() -> None:
    """Learned variance is left out; the order of the halves does not matter; 2x2 pixels a token."""
    transformer = dit(in_channels=4, out_channels=8)
    x, labels = noise(2, channels=4), torch.tensor([3, 8])
    kept = {}
    for order in ("cond_first", "uncond_first"):
        diffratio.apply_(transformer, Importance())
        attachment(transformer).open_run(uniform_run(4, TokenGrid(6, 6)))
        with torch.no_grad():
            conditional, unconditional = guided_forward(transformer, x, 1.0, labels, order)
        method: Any = attachment(transformer).token_method
        kept[order] = method.carried.next
        diffratio.remove_(transformer)
    for b in range(2):
        for n in range(36):
            row, column = 2 * (n // 6), 2 * (n % 6)
            place = (b, slice(0, 4), slice(row, row + 2), slice(column, column + 2))
            expected = (conditional[place] - unconditional[place]).abs().mean()
            torch.testing.assert_close(kept["uncond_first"][b, n], expected)
    torch.testing.assert_close(kept["cond_first"], kept["uncond_first"])


@pytest.mark.parametrize("sides", [(6, 6), (5, 7), (8, 4)])
@pytest.mark.parametrize("matching", ["distance", "cosine"])
def test_with_p_1_exactly_the_tokens_outside_the_pool_merge(sides: tuple[int, int], matching: str) -> None:
    tokens = sides[0] * sides[1]
    importance, x = torch.rand(2, tokens), torch.randn(4, tokens, 16)
    for ratio in (0.2, 0.5, 0.75):
        plan = plan_after(Importance(ratio=ratio, matching=matching), importance, x, sides=sides)
        for b in range(4):
            ranked = importance[b % 2].argsort(descending=True).tolist()
            assert plan.index[b].tolist() == sorted(ranked[: tokens - int(ratio * tokens)])


def test_distance_joins_the_nearest_destination_and_both_halves_share_the_plan() -> None:
    importance, x = torch.rand(2, 36), torch.randn(4, 36, 16)
    plan = plan_after(Importance(ratio=0.5), importance, x)
    assert torch.equal(plan.slots[:2], plan.slots[2:])
    again = plan_after(Importance(ratio=0.5), importance, torch.randn(4, 36, 16))
    assert torch.equal(plan.slots, again.slots)  # nothing of the features is in it
    for b in range(2):
        kept = plan.index[b].tolist()
        sizes = plan.slots[b].bincount(minlength=18).tolist()
        gone = [n for n in range(36) if n not in kept]
        used = {int(plan.index[b, plan.slots[b, n]]) for n in gone}
        assert len(used) <= 9 and sum(size > 1 for size in sizes) == len(used)

        def distance(n: int, m: int) -> int:
            return (n // 6 - m // 6) ** 2 + (n % 6 - m % 6) ** 2

        for n in gone:
            target = int(plan.index[b, plan.slots[b, n]])
            assert distance(n, target) == min(distance(n, m) for m in used)


def test_a_wider_pool_lets_similarity_choose_among_the_protected() -> None:
    """p = 1.4, ratio 0.5: 25 protected, 11 outside; those and the 7 best-matching others merge."""
    importance, x = torch.rand(2, 36), torch.randn(4, 36, 16)
    config = Importance("sd", ratio=0.5)
    plan = plan_after(config, importance, x)
    free = plan_after(Importance("sd", ratio=0.5, pool=2.0), importance, x)  # all 36 are protected
    for b in range(4):
        outside = set(importance[b % 2].argsort()[:11].tolist())
        gone = set(range(36)) - set(plan.index[b].tolist())
        assert outside < gone and len(gone) == 18
        assert not outside <= set(range(36)) - set(free.index[b].tolist())


@pytest.mark.parametrize(("variant", "drops"), [("pixart", 4), ("sd", 2)])
def test_the_first_steps_drop(variant: str, drops: int) -> None:
    for step in range(1, 8):
        plan = plan_after(Importance(variant), torch.rand(2, 36), torch.randn(4, 36, 16), step)
        assert isinstance(plan, KeepPlan if step < drops else MergePlan)


def test_the_first_step_keeps_one_token_a_cell() -> None:
    method = ImportanceMethod(Importance(ratio=0.75), describe(dit(num_layers=4)))
    ctx = context(0, halves="uncond_first")
    method.begin_step(ctx)
    method.plan(2, "block", torch.randn(4, 36, 16), ctx)
    plan: Any = method.plan(2, "self_attention", torch.randn(4, 36, 16), ctx)
    kept = plan.index[0].tolist()
    assert sorted((n // 6 // 2, n % 6 // 2) for n in kept) == [(r, c) for r in range(3) for c in range(3)]
    assert (plan.index == plan.index[0]).all()


def test_variants_fill_what_is_not_given() -> None:
    assert Importance().resolved.blocks == 0.5 and Importance("sd").resolved.pool == 1.4
    assert Importance("sd", ratio=0.2).resolved.ratio == 0.2
    method = ImportanceMethod(Importance(), describe(dit(num_layers=8)))
    assert method.layers == (2, 3, 4, 5) and method.sites() == ("self_attention",)
    assert Importance().as_published and not Importance(sites=BOTH).as_published
    assert not Importance(blocks=0.75).as_published and Importance("sd").as_published
    with pytest.raises(DiffratioError, match="no site 'cross_attention'"):
        diffratio.apply_(dit(), Importance(sites=("cross_attention",)))


def test_without_guidance_it_is_an_error() -> None:
    transformer = diffratio.apply_(dit(), Importance())
    attachment(transformer).open_run(uniform_run(4, TokenGrid(6, 6), "none"))
    with pytest.raises(DiffratioError, match=r"importance compares the two guidance halves.*guidance_scale above 1"):
        transformer(noise(), torch.full((3,), 1000.0), torch.tensor([1, 2, 3]))
    with pytest.raises(DiffratioError, match="guidance halves"):
        diffratio.macs(transformer, steps=4, guidance=False)
    with pytest.raises(DiffratioError, match="guidance halves"):
        diffratio.for_budget("importance", dit(), 0.8, guidance=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "pixel"}, "did you mean pixart"),
        ({"ratio": 0.8}, r"ratio 0.8 is outside \[0, 0.75\]"),
        ({"pool": 0.9}, r"pool 0.9 is outside \[1, 4\]"),
        ({"matching": "grid"}, "known are cosine, distance"),
        ({"sites": ()}, "sites"),
        ({"blocks": 1.1}, "blocks 1.1"),
        ({"drop_steps": -1}, "drop_steps"),
        ({"plan_blocks": 0}, "plan_blocks"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        Importance(**settings)
    assert "\n" not in str(caught.value)


def test_predictions_of_other_channels_are_refused() -> None:
    method = ImportanceMethod(Importance(), describe(dit()))
    with pytest.raises(DiffratioError, match="cannot tell the noise among 5 predicted channels"):
        method.end_step(torch.randn(4, 5, 12, 12), context(0, halves="cond_first"))


def test_guidance_steers_it() -> None:
    """Other labels, other importance, other tokens: at the same noise."""
    x = noise(1)
    dense = [generate(dit(), x, torch.tensor([label])) for label in (1, 2)]
    merged = [generate(diffratio.apply_(dit(), Importance(blocks=1.0)), x, torch.tensor([label])) for label in (1, 2)]
    assert not torch.allclose(dense[0] - merged[0], dense[1] - merged[1], atol=1e-3)
