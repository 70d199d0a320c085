"""DaTo: which tokens are base tokens, which are pruned, and where their results come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guided import context, dit, generate, noise
from torch.nn import functional

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import seeded_normal
from diffratio.tokens.plan import AttentionPlan
from diffratio.tokens.pruning import base_tokens, prune_similar

GRID = TokenGrid(6, 6)


def applied(layers: int = 4, seed: int = 0, **settings: Any) -> Any:
    return diffratio.apply_(dit(num_layers=layers), diffratio.DaTo(**settings), seed=seed)


def method_of(transformer: Any) -> Any:
    return attachment(transformer).token_method


@pytest.mark.parametrize("sides", [(6, 6), (5, 7)])
def test_base_tokens_are_the_highest_of_their_cell(sides: tuple[int, int]) -> None:
    grid, scores = TokenGrid(*sides), torch.randn(3, sides[0] * sides[1])
    base = base_tokens(scores, grid)
    for sample in range(3):
        picture = scores[sample].view(*sides)
        expected = []
        for row in range(0, sides[0] - 1, 2):
            for column in range(0, sides[1] - 1, 2):
                at = picture[row : row + 2, column : column + 2].flatten().argmax().item()
                expected.append((row + at // 2) * sides[1] + column + at % 2)
        assert base[sample].tolist() == sorted(expected)


@pytest.mark.parametrize("from_kept", [False, True])
def test_the_most_similar_are_pruned_and_refilled_by_the_most_similar(from_kept: bool) -> None:
    """Against loops in float64."""
    metric, removed = torch.randn(2, 36, 5, dtype=torch.float64), 20
    base = base_tokens(torch.randn(2, 36), GRID)
    plan = prune_similar(metric, base, removed, from_kept)
    cosine = functional.cosine_similarity(metric[:, :, None], metric[:, None], dim=-1)
    for sample in range(2):
        bases = base[sample].tolist()
        best = {t: max(cosine[sample, t, b].item() for b in bases) for t in range(36) if t not in bases}
        pruned = set(sorted(best, key=lambda t: -best[t])[:removed])
        kept = [t for t in range(36) if t not in pruned]
        assert plan.index[sample].tolist() == kept
        assert plan.fill is not None
        for token in range(36):
            source = kept[int(plan.fill[sample, token])]
            among = kept if from_kept else bases
            expected = token if token in kept else max(among, key=lambda t: cosine[sample, token, t].item())
            assert source == expected


def test_the_score_is_the_change_of_the_last_two_computed_predictions() -> None:
    """With every second step cached: what step 2 left against step 0, both halves averaged; one plan for both."""
    transformer = applied(every=2.0, ratio=0.5)
    method, run = method_of(transformer), uniform_run(6, GRID)
    outputs = {step: torch.randn(4, 1, 12, 12) for step in range(4)}
    scored: list[torch.Tensor] = []
    for step in range(5):
        ctx = context(step, halves="uncond_first")
        method.begin_step(ctx)
        if step % 2 == 0:
            x = torch.randn(4, 36, 16)
            plan = method.plan(1, "self_attention", x, ctx)
            assert method.plan(2, "self_attention", torch.randn(4, 36, 16), ctx) is plan  # one for all blocks
            assert torch.equal(plan.index[:2], plan.index[2:]) and torch.equal(plan.fill[:2], plan.fill[2:])
            assert plan.kept == 18
            change = method._change(ctx)
            scored += [] if change is None else [change]
        if step < 4:
            method.end_step(outputs[step], ctx)  # that of a cached step does not count
    apart = (outputs[2] - outputs[0]).abs().unflatten(0, (2, 2)).mean(0)  # the halves' mean
    patches = apart.view(2, 6, 2, 6, 2).mean((2, 4)).flatten(1)
    assert len(scored) == 1
    torch.testing.assert_close(scored[0], patches / patches.mean(1, keepdim=True))
    metric = functional.normalize(x, dim=-1).unflatten(0, (2, 2)).mean(0)
    draws = 0.1 * seeded_normal((36,), 0, 4)
    expected = prune_similar(metric, base_tokens(scored[0] + draws, GRID), 18)
    assert torch.equal(plan.index[:2], expected.index)
    assert run.steps == 6


@pytest.mark.parametrize(("polarity", "sign"), [("high", 1), ("low", -1)])
def test_polarity_turns_the_score(polarity: str, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(applied(polarity=polarity, noise=0.0, every=1.0))
    change = torch.rand(2, 36) + 0.5
    monkeypatch.setattr(method, "_change", lambda ctx: change)
    ctx = context(0)
    method.begin_step(ctx)
    x = torch.randn(2, 36, 16)
    plan = method.plan(1, "self_attention", x, ctx)
    assert torch.equal(plan.index, prune_similar(x, base_tokens(sign * change, GRID), 18).index)
    drawn = method_of(applied(polarity="random"))
    assert {drawn._sign(context(step)) for step in range(6)} == {1.0, -1.0}


def test_scopes_reduce_their_sites_in_all_blocks_but_the_first_and_last() -> None:
    for scope, sites in (("attn", ["self_attention"]), ("attn_ff", ["self_attention", "feed_forward"])):
        method = method_of(applied(scope=scope))
        run = uniform_run(6, GRID)
        used = [method.use(layer, 0, run).tokens or {} for layer in range(4)]
        assert [list(one) for one in used] == [[], sites, sites, []]
        assert all(pair == (18, 18) for one in used for pair in one.values())
    queries = method_of(applied(scope="attn_q"))
    assert queries.use(1, 0, run).tokens == {"self_attention": (18, 36)}
    queries.begin_step(context(0))
    plan = queries.plan(1, "self_attention", torch.randn(2, 36, 16), context(0))
    assert isinstance(plan, AttentionPlan) and plan.keys is None and plan.kept == 18
    assert queries.plan(0, "self_attention", torch.randn(2, 36, 16), context(0)) is None


def test_cached_results_fill_pruned_tokens() -> None:
    """A site's output at a pruned token is the one of the last step that computed it."""
    method = method_of(applied(every=1.0, scope="attn_ff", fill="cached"))
    x, known = torch.randn(2, 36, 16), torch.zeros(2, 36, 3)
    for step in range(3):
        method.begin_step(context(step))
        plan = method.plan(1, "self_attention", x, context(step))
        fresh = torch.randn(2, plan.reduce(x).shape[1], 3)
        result = plan.restore(fresh, x)
        if step == 0:
            assert plan.reduce(x) is x and torch.equal(result, fresh)
        else:
            assert plan.kept == 18
            expected = known.scatter(1, plan.index[..., None].expand_as(fresh), fresh)
            assert torch.equal(result, expected)
        known = result
        method.plan(1, "feed_forward", x, context(step)).restore(torch.zeros_like(fresh), x)  # has its own
        method.end_step(torch.randn(2, 1, 12, 12), context(step))


CONFIGS: list[dict[str, Any]] = [
    {"mode": "prune"},
    {"action": "E", "every": 3.0},
    {"action": "R", "scope": "attn_q", "refill": "release"},
    {"scope": "attn_ff", "fill": "cached", "polarity": "random", "every": 1.5},
    {"mode": "cache", "first_blocks": 0, "last_blocks": 2},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_generations_repeat_cost_what_is_counted_and_leave_nothing(settings: dict[str, Any]) -> None:
    x, transformer = noise(2), applied(**settings)
    plain = generate(dit(num_layers=4), x)
    first = generate(transformer, x)
    assert first.isfinite().all() and not torch.allclose(first, plain, atol=1e-4)
    swapped = generate(transformer, x, order="uncond_first")
    torch.testing.assert_close(swapped, first, atol=1e-4, rtol=1e-4)
    alone = generate(transformer, x[1:], labels=torch.tensor([1]))
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=1e-4)
    cost = diffratio.macs(transformer, run=uniform_run(6, GRID))
    assert count_macs(transformer, lambda: generate(transformer, x)) == pytest.approx(2 * cost.total, rel=1e-3)
    assert torch.equal(generate(transformer, x), first)
    diffratio.remove_(transformer)
    assert torch.equal(generate(transformer, x), plain)


@pytest.mark.parametrize("mode", ["cache", "prune", "both"])
def test_every_mode_is_solved_for_a_budget(mode: str) -> None:
    transformer, run = dit(num_layers=8), uniform_run(20, GRID)
    cls = diffratio.DaTo().method
    config: Any = cls.for_budget(describe(transformer), run, 0.84, mode=mode)  # type: ignore[call-arg]
    assert 0.83 <= cls(config, describe(transformer)).macs(run).fraction <= 0.84
    choices = config.choices(20)
    cached = any(one.action != "C" for one in choices)
    pruned = any(one.ratio for one in choices)
    assert (cached, pruned) == (mode != "prune", mode != "cache")
    if mode == "prune":
        with pytest.raises(BudgetUnreachable, match="pruning leaves a quarter"):
            cls.for_budget(describe(transformer), run, 0.2, mode=mode)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.76}, r"dato: ratio 0.76 is outside \[0, 0.75\]"),
        ({"every": 0.5}, "dato: every 0.5 must be a number of at least 1"),
        ({"action": "C"}, "unknown dato action 'C'"),
        ({"scope": "ff"}, "unknown dato scope 'ff'.*attn_q"),
        ({"schedule": "file.json"}, "no step schedule; diffratio.load_step_schedule"),
        ({"first_blocks": -1}, "first_blocks must be an integer of at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        diffratio.DaTo(**settings)


def test_what_does_not_go_together_is_refused() -> None:
    cache, dato = diffratio.BlockCache(), diffratio.DaTo()
    for pair in ([cache, dato], [dato, cache]):
        with pytest.raises(DiffratioError, match="both decide which steps.*mode=prune"):
            diffratio.apply_(dit(), pair)
    diffratio.apply_(dit(), [cache, diffratio.DaTo(mode="prune")])
    with pytest.raises(DiffratioError, match="reuses outputs .actions R and X. and sdtm must see every step"):
        diffratio.apply_(dit(), [diffratio.BlockCache(actions=("C", "R")), diffratio.SDTM()])
    sd3 = diffratio.backbones.get_backbone("sd3").tiny(dual_attention_layers=(1,))
    with pytest.raises(DiffratioError, match="fill=cached keeps one result a site.*second attention"):
        diffratio.apply_(sd3, diffratio.DaTo(fill="cached"))
    with pytest.raises(DiffratioError, match="leave none of 2 blocks to skip"):
        generate(applied(layers=2), noise(1))
    with pytest.raises(DiffratioError, match="1x6 token grid holds no whole 2x2 cell"):
        diffratio.DaTo().removed(TokenGrid(1, 6), 4)


def test_variants_are_its_two_halves() -> None:
    """`dato:cache` computes fewer steps and prunes nothing, `dato:prune` the reverse, each at the budget."""
    transformer = get_backbone("dit").tiny(sample_size=32, patch_size=2, num_layers=8)
    for name in ("cache", "prune", "both"):
        config: Any = diffratio.for_budget(f"dato:{name}", transformer, 0.8, steps=20)
        assert config.mode == name
        diffratio.apply_(transformer, config)
        assert 0.79 <= diffratio.macs(transformer, steps=20).fraction <= 0.8
        diffratio.remove_(transformer)
    with pytest.raises(DiffratioError, match="variant of method 'dato'"):
        diffratio.for_budget("dato:half", transformer, 0.8)
