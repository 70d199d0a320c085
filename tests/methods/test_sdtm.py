"""Structure-then-detail merging against its definition, written out naively."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from guided import context, dit, generate, noise
from torch import Tensor

import diffratio
from diffratio.errors import DiffratioError
from diffratio.methods.sdtm import SDTMMethod
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import window_similarity

SDTM = diffratio.SDTM
BOTH = ("self_attention", "feed_forward")


def method_of(config: SDTM) -> SDTMMethod:
    return SDTMMethod(config, describe(dit()))


def plan_of(method: SDTMMethod, x: Tensor, step: int, site: str = "feed_forward", **changes: Any) -> Any:
    """The plan of one step, whose state is handed on."""
    ctx = context(step, steps=10, **changes)
    method.begin_step(ctx)
    method.plan(0, "block", x, ctx)
    plan = method.plan(0, site, x, ctx)
    method.end_step(torch.empty(0), ctx)
    return plan


def test_the_schedule_goes_from_half_to_a_tenth() -> None:
    config, steps = SDTM(levels=1000), 20
    fractions = [config.fraction(i, steps) for i in range(steps)]
    for i, fraction in enumerate(fractions):
        assert fraction == pytest.approx(0.1 + 0.4 * math.cos(math.pi / 2 * i / 19), abs=3e-4)
    assert fractions[0] == pytest.approx(0.5) and fractions[-1] == pytest.approx(0.1)
    few = {SDTM().fraction(i, steps) for i in range(steps)}
    assert sorted(few) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for i in range(steps):
        assert abs(SDTM().fraction(i, steps) - fractions[i]) <= 0.05 + 1e-3  # the nearest level
    assert SDTM().fraction(0, 1) == pytest.approx(0.5)  # a single step
    assert {SDTM(0.3, 0.0).fraction(i, steps) for i in range(steps)} == {0.3}


@pytest.mark.parametrize(("steps", "last"), [(20, 8), (5, 2), (15, 6), (7, 2), (1, 0)])
def test_structure_lasts_to_the_switch(steps: int, last: int) -> None:
    assert [i for i in range(steps) if SDTM().structure(i, steps)] == list(range(last + 1))


@pytest.mark.parametrize("sides", [(6, 6), (5, 7), (2, 9), (3, 3)])
def test_counts_are_whole_windows_and_never_more_than_there_are(sides: tuple[int, int]) -> None:
    grid, tokens = TokenGrid(*sides), sides[0] * sides[1]
    windows = (sides[0] // 2) * (sides[1] // 2)
    for config in (SDTM(), SDTM(0.75, 0.0), SDTM(0.5, 0.25)):
        method = method_of(config)
        for step in range(10):
            removed, wanted = method.removed(grid, step, 10), config.fraction(step, 10) * tokens
            if config.structure(step, 10):
                assert removed == 3 * min(windows, int(wanted / 3 + 1e-6))
            else:
                assert removed == min(int(wanted + 1e-6), tokens - windows)


def test_structure_steps_merge_around_both_and_detail_steps_around_the_mlp() -> None:
    x = torch.randn(1, 36, 16)
    for sites, attention in ((("feed_forward",), False), (BOTH, True)):
        method = method_of(SDTM(detail_sites=sites))
        for step in range(10):
            ctx = context(step, steps=10)
            method.begin_step(ctx)
            method.plan(0, "block", x, ctx)
            merged = {site for site in BOTH if method.plan(0, site, x, ctx) is not None}
            method.end_step(torch.empty(0), ctx)
            assert merged == (set(BOTH) if step <= 4 or attention else {"feed_forward"})


def naive_similarity(tokens: list[Tensor], self_pairs: bool) -> float:
    total, pairs = 0.0, 0
    for a, one in enumerate(tokens):
        for b, other in enumerate(tokens):
            if a != b or self_pairs:
                total += float(one @ other / one.norm() / other.norm())
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("sides", [(6, 6), (5, 7)])
def test_structure_collapses_the_windows_of_the_highest_score(variant: str, sides: tuple[int, int]) -> None:
    """Two steps: the second one's scores hold the frequency that the first one left."""
    height, width = sides
    weight, tokens = 0.7, height * width
    method = method_of(SDTM(0.4, 0.0, variant=variant, structure_weight=weight, random=False))
    windows = [
        [r * width + c, r * width + c + 1, (r + 1) * width + c, (r + 1) * width + c + 1]
        for r in range(0, height - 1, 2)
        for c in range(0, width - 1, 2)
    ]
    ages = [[0.0] * tokens for _ in range(2)]
    for step in range(3):
        x = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(step)).double()
        plan = plan_of(method, x, step, sides=sides)
        count = min(len(windows), int(0.4 * tokens / 3 + 1e-6))
        assert plan.kept == tokens - 3 * count
        for b in range(2):
            mean = sum(ages[b]) / tokens or 1.0
            scores = [
                naive_similarity([x[b, n] for n in window], variant == "release")
                + weight * sum(ages[b][n] for n in window) / mean / 4
                for window in windows
            ]
            chosen = sorted(range(len(windows)), key=lambda w: -scores[w])[:count]
            gone = {n for w in chosen for n in windows[w][1:]}
            assert plan.index[b].tolist() == [n for n in range(tokens) if n not in gone]
            for w in chosen:
                assert len(set(plan.slots[b][windows[w]].tolist())) == 1
                slot = plan.slots[b][windows[w][0]]
                torch.testing.assert_close(plan.reduce(x)[b, slot], x[b, windows[w]].mean(0))
            ages[b] = [ages[b][n] + 1 if n in gone else 0.0 for n in range(tokens)]


def test_the_destination_of_a_window_is_drawn() -> None:
    x = torch.randn(2, 36, 8)
    chosen = [plan_of(method_of(SDTM(0.75, 0.0)), x, 0, seed=seed).index[0].tolist() for seed in range(4)]
    assert len({tuple(row) for row in chosen}) == 4
    for row in chosen:
        assert sorted((n // 6 // 2, n % 6 // 2) for n in row) == [(r, c) for r in range(3) for c in range(3)]


def test_detail_steps_of_the_paper_merge_the_least_attended_tokens() -> None:
    """After one structure step, so that there are frequencies; the value-norm proxy stands for attention."""
    weight = 0.3
    method = method_of(SDTM(0.4, 0.0, switch=0.0, detail_weight=weight, random=False))
    before = plan_of(method, torch.randn(2, 36, 8), 0)
    x = torch.randn(2, 36, 8)
    plan = plan_of(method, x, 1)
    assert plan.kept == 36 - 14
    for b in range(2):
        ages = torch.tensor([0.0 if n in before.index[b].tolist() else 1.0 for n in range(36)])
        norms = x[b].norm(dim=-1)
        score = (1 - norms / norms.mean() + weight * ages / ages.mean()).tolist()
        cells = [
            [r * 6 + c, r * 6 + c + 1, r * 6 + 6 + c, r * 6 + 7 + c] for r in range(0, 6, 2) for c in range(0, 6, 2)
        ]
        destinations = [min(cell, key=lambda n: score[n]) for cell in cells]
        sources = [n for n in range(36) if n not in destinations]
        gone = sorted(sources, key=lambda n: -score[n])[:14]
        assert plan.index[b].tolist() == [n for n in range(36) if n not in gone]
        for n in gone:
            partner = max(destinations, key=lambda m: float(torch.cosine_similarity(x[b, n], x[b, m], dim=0)))
            assert plan.slots[b, n] == plan.slots[b, partner]


def test_detail_steps_of_the_release_keep_what_was_unserved_longest() -> None:
    method = method_of(SDTM(0.75, 0.0, switch=0.0, variant="release", random=False))
    cells = [[r * 6 + c, r * 6 + c + 1, r * 6 + 6 + c, r * 6 + 7 + c] for r in range(0, 6, 2) for c in range(0, 6, 2)]
    for step in range(5):  # everything is merged every time, so each token of a cell has its turn
        plan = plan_of(method, torch.randn(1, 36, 8), step)
        assert plan.index[0].tolist() == sorted(cell[step % 4] for cell in cells)


def test_both_halves_share_the_plan_of_their_mean() -> None:
    x = torch.randn(4, 36, 8)
    plans = {}
    for order in ("cond_first", "uncond_first"):
        for step in (0, 7):
            method = method_of(SDTM(switch=0.4, random=False))
            method.carried.at = step - 1  # entered in the middle of a run
            plan = plan_of(method, x if order == "cond_first" else x.roll(2, 0), step, halves=order)
            assert torch.equal(plan.slots[:2], plan.slots[2:])
            plans[order, step] = plan.slots
    for step in (0, 7):
        assert torch.equal(plans["cond_first", step], plans["uncond_first", step])
    unit = x / x.norm(dim=-1, keepdim=True)
    mean = (unit[:2] + unit[2:]) / 2
    scores = window_similarity(mean, TokenGrid(6, 6), 2)
    best = scores.argmax(1)
    for b in range(2):
        corner = int(best[b]) // 3 * 12 + int(best[b]) % 3 * 2
        assert plans["cond_first", 0][b, corner] == plans["cond_first", 0][b, corner + 7]


def test_one_plan_a_step_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = SDTMMethod._made

    def spy(self: SDTMMethod, x: Tensor, ctx: Any) -> Any:
        made.append(ctx.step)
        return original(self, x, ctx)

    monkeypatch.setattr(SDTMMethod, "_made", spy)
    for settings, expected in (
        ({}, list(range(6))),
        ({"plan_blocks": 2}, [step for step in range(6) for _ in range(2)]),
        # step 3 begins the detail phase, which needs a plan of its own
        ({"ratio": 0.4, "deviation": 0.0, "plan_every": 4}, [0, 3, 4]),
    ):
        made.clear()
        transformer = diffratio.apply_(dit(), SDTM(**settings))
        generate(transformer, noise())
        assert made == expected
        assert attachment(transformer).token_method.sites() == BOTH


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.8}, r"ratio 0.8 is outside \[0, 0.75\]: each 2x2 window keeps one token"),
        ({"ratio": 0.6}, r"ratio 0.6 \+ deviation 0.2 exceeds 0.75"),
        ({"ratio": 0.1}, r"deviation 0.2 is outside \[0, 0.1\]"),
        ({"window": 1}, "window must be an integer of at least 2"),
        ({"switch": 2}, r"switch 2 is outside \[0, 1\]"),
        ({"variant": "papers"}, "did you mean paper"),
        ({"levels": 0}, "levels must be an integer of at least 1"),
        ({"plan_every": 0}, "plan_every"),
        ({"plan_blocks": 0}, "plan_blocks"),
        ({"detail_weight": float("nan")}, "detail_weight nan"),
        ({"detail_sites": ("cross_attention",)}, "detail_sites"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        SDTM(**settings)
    assert "\n" not in str(caught.value)
