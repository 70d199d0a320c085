"""SDTM with stored outputs: what dense steps keep, and what merged tokens make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from guided import STEPS, context, dit, generate, guided_forward, noise
from torch import Tensor

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import DiffratioError
from diffratio.methods import get_method
from diffratio.methods.sdtm_cached import SDTMCachedMethod
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.plan import BlendPlan
from diffratio.tokens.pruning import StoredPlan

SDTMCached = diffratio.SDTMCached
BOTH = ("self_attention", "feed_forward")
GRID = TokenGrid(6, 6)


def method_of(transformer: Any) -> SDTMCachedMethod:
    method = attachment(transformer).token_method
    assert isinstance(method, SDTMCachedMethod)
    return method


def predictions(transformer: Any, applied: bool = True) -> list[Tensor]:
    """Of every step, on inputs that do not depend on what was predicted before."""
    labels, found = torch.tensor([3, 8]), []
    run = uniform_run(STEPS, GRID)
    if applied:
        attachment(transformer).open_run(run)
    for step, level in enumerate(run.noise_levels):
        with torch.no_grad():
            found.append(torch.stack(guided_forward(transformer, noise(2, seed=step), level, labels, "cond_first")))
        if applied:
            attachment(transformer).step += 1
    return found


def test_a_dense_step_every_step_is_the_dense_model_bit_for_bit() -> None:
    x = noise(2)
    assert torch.equal(generate(diffratio.apply_(dit(), SDTMCached(refresh=1)), x), generate(dit(), x))


@pytest.mark.parametrize("refresh", [2, 3])
def test_without_blend_steps_are_dense_or_those_of_sdtm(refresh: int) -> None:
    """Frequencies begin anew at a dense step, so they have no weight here."""
    settings: dict[str, Any] = {"structure_weight": 0.0, "detail_weight": 0.0}
    merged = predictions(diffratio.apply_(dit(), diffratio.SDTM(**settings)))
    dense = predictions(dit(), applied=False)
    unblended = predictions(diffratio.apply_(dit(), SDTMCached(**settings, refresh=refresh, blend=0.0)))
    blended = predictions(diffratio.apply_(dit(), SDTMCached(**settings, refresh=refresh)))
    for step in range(STEPS):
        assert not torch.allclose(merged[step], dense[step], atol=1e-4)
        expected = dense[step] if step % refresh == 0 else merged[step]
        assert torch.equal(unblended[step], expected)
        assert torch.equal(blended[step], expected) == (step % refresh == 0)


def test_the_blend_by_hand() -> None:
    """Tokens 0 and 2 are merged into 0, token 3 into 1; what vanished is 2 and 3."""
    index, slots = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 0, 1]])
    x = torch.tensor([[[1.0], [2.0], [3.0], [6.0]]])
    stored = torch.tensor([[[10.0], [20.0], [30.0], [40.0]]])
    plan = BlendPlan(index, slots, stored=stored, blend=0.75)
    assert plan.reduce(x).flatten().tolist() == [2.0, 4.0]
    result = plan.restore(torch.tensor([[[100.0], [200.0]]]), x)
    assert result.flatten().tolist() == [100.0, 200.0, 0.25 * 100 + 0.75 * 30, 0.25 * 200 + 0.75 * 40]
    whole = BlendPlan(index, slots, stored=stored, blend=1.0).restore(torch.tensor([[[100.0], [200.0]]]), x)
    assert whole.flatten().tolist() == [100.0, 200.0, 30.0, 40.0]


def test_a_site_falls_back_on_its_own_last_dense_output() -> None:
    """Two sites of two blocks over two intervals; nothing that is merged is stored."""
    method = SDTMCachedMethod(SDTMCached(switch=1.0, blend=0.9), describe(dit()))
    x, known = torch.randn(2, 36, 16), {}
    for step in range(STEPS):
        ctx = context(step)
        method.begin_step(ctx)
        for layer in (0, 1):
            assert method.plan(layer, "block", x, ctx) is None
            for site in BOTH:
                plan: Any = method.plan(layer, site, x, ctx)
                fresh = torch.randn(plan.reduce(x).shape)
                result = plan.restore(fresh, x)
                if step % 3 == 0:
                    assert isinstance(plan, StoredPlan) and plan.reduce(x) is x and torch.equal(result, fresh)
                    known[layer, site] = result
                    continue
                spread = fresh.gather(1, plan.slots[..., None].expand(-1, -1, 16))
                expected = 0.1 * spread + 0.9 * known[layer, site]
                alone = torch.zeros(2, 36, dtype=torch.bool).scatter(1, plan.index, True)
                assert 0 < int(alone.sum()) < 72
                torch.testing.assert_close(result[~alone], expected[~alone])
                assert torch.equal(result[alone], spread[alone])
        method.end_step(torch.empty(0), ctx)


def test_outputs_are_stored_where_steps_merge_before_the_next_dense_one() -> None:
    method, run = SDTMCachedMethod(SDTMCached(), describe(dit())), uniform_run(10, GRID)
    stored = {step: method.storing_sites(step, run) for step in range(10)}
    assert stored == {step: () for step in range(10)} | {0: BOTH, 3: BOTH, 6: ("feed_forward",)}  # none after step 9
    assert [step for step in range(10) if method.removed(GRID, step, 10)] == [1, 2, 4, 5, 7, 8]
    for quiet in (SDTMCached(blend=0.0), SDTMCached(0.0, 0.0), SDTMCached(refresh=1)):
        assert SDTMCachedMethod(quiet, describe(dit())).stored_numbers(run) == 0


def test_a_shared_plan_is_made_after_the_dense_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = SDTMCachedMethod._made

    def spy(self: SDTMCachedMethod, x: Tensor, ctx: Any) -> Any:
        made.append(ctx.step)
        return original(self, x, ctx)

    monkeypatch.setattr(SDTMCachedMethod, "_made", spy)
    config = SDTMCached(0.4, 0.0, switch=0.0, refresh=4, plan_every=2)
    generate(diffratio.apply_(dit(), config), noise(1), steps=8)
    assert made == [1, 3, 5, 7]


CONFIGS: list[dict[str, Any]] = [
    {},
    {"refresh": 2, "variant": "release", "plan_blocks": 1, "layers": (0, 2)},
    {"refresh": 5, "blend": 0.5, "mix": True, "plan_every": 3, "detail_sites": BOTH},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_generations_repeat_cost_what_is_counted_and_leave_nothing(settings: dict[str, Any]) -> None:
    x, transformer, sizes = noise(2), diffratio.apply_(dit(), SDTMCached(**settings)), []
    plain = generate(dit(), x)

    def visit(step: int) -> None:
        results = method_of(transformer).results.values()
        sizes.append(sum(result.untyped_storage().nbytes() for _, result in results))

    first = generate(transformer, x, visit=visit)
    assert first.isfinite().all() and not torch.allclose(first, plain, atol=1e-4)
    run = uniform_run(STEPS, GRID)
    assert max(sizes) == 4 * 2 * method_of(transformer).stored_numbers(run) > 0  # float32, two samples of both halves
    mebibytes = max(sizes) / 2 / 2**20
    assert f"stored from step to step: {mebibytes:.3g} MiB a sample in float32" in diffratio.summary(
        transformer, run=run
    )
    assert not method_of(transformer).results  # freed with the run
    swapped = generate(transformer, x, order="uncond_first")
    torch.testing.assert_close(swapped, first, atol=1e-4, rtol=1e-4)
    alone = generate(transformer, x[1:], labels=torch.tensor([1]))
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=1e-4)
    cost = diffratio.macs(transformer, run=run)
    assert count_macs(transformer, lambda: generate(transformer, x)) == pytest.approx(2 * cost.total, rel=1e-3)
    assert torch.equal(generate(transformer, x), first)
    diffratio.remove_(transformer)
    assert torch.equal(generate(transformer, x), plain)


def test_stored_outputs_of_dato_are_counted_too() -> None:
    transformer = diffratio.apply_(dit(num_layers=4), diffratio.DaTo(every=1.0, scope="attn_ff", fill="cached"))
    sizes: list[int] = []
    method: Any = attachment(transformer).token_method

    def visit(step: int) -> None:
        sizes.append(sum(result.nbytes for _, result in method.carried.next.results.values()))

    generate(transformer, noise(2), visit=visit)
    assert set(sizes) == {4 * 2 * method.stored_numbers(uniform_run(STEPS, GRID))} and sizes[0] > 0
    assert method.carried.next is None


def test_steps_without_guidance_take_the_conditional_half() -> None:
    """Stored by both halves, used by one, and the other way round."""
    config = SDTMCached(switch=1.0, blend=1.0)
    transformer = diffratio.apply_(dit(), [diffratio.GuidanceInterval(skip=0.5), config])
    assert generate(transformer, noise(2)).isfinite().all()
    guided = attachment(transformer).adapt(uniform_run(STEPS, GRID)).guided
    assert guided is not None and len(set(guided)) == 2
    method = SDTMCachedMethod(config, describe(dit()))
    x = torch.randn(2, 36, 16)
    for stored, wanted in (("uncond_first", "cond"), ("cond", "cond_first")):
        first, second = context(0, halves=stored), context(1, halves=wanted)
        known = x if first.paired else x[1:]
        method.begin_step(first)
        method.plan(0, "block", known, first)
        method.plan(0, "feed_forward", known, first).restore(known, known)  # type: ignore[union-attr]
        method.begin_step(second)
        then = x if second.paired else x[1:]
        method.plan(0, "block", then, second)
        plan: Any = method.plan(0, "feed_forward", then, second)
        assert torch.equal(plan.stored, x[1:].repeat(len(then), 1, 1))
    method.begin_run(uniform_run(STEPS, GRID))
    method.begin_step(context(1, halves="cond_first"))
    method.plan(0, "block", x, second)
    with pytest.raises(DiffratioError, match="feed_forward of block 0 stored nothing in this run before step 1"):
        method.plan(0, "feed_forward", x, second)


def joint(family: str, config: Any, **changes: Any) -> tuple[Any, list[dict[str, Any]], list[Any]]:
    """Two steps of a joint-attention family on the same input: arguments and outputs of each call of an attention."""
    torch.manual_seed(0)
    backbone = get_backbone(family)
    transformer: Any = diffratio.apply_(backbone.tiny(**changes).eval(), config)
    given: list[dict[str, Any]] = []
    outputs: list[Any] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given.append(kwargs)
        outputs.append(output)

    for block in backbone.blocks(transformer):
        for module in backbone.site_modules(block, "self_attention"):
            module.register_forward_hook(hook, with_kwargs=True)
    run = SamplingRun((1.0, 0.5), TokenGrid(4, 4), "none", 5)
    attachment(transformer).open_run(run)
    arguments = backbone.example(transformer, 2, run=run) | {"timestep": backbone.timestep(torch.tensor([0.5, 0.5]))}
    with torch.no_grad():
        for _ in range(2):
            transformer(**arguments, return_dict=False)
            attachment(transformer).step += 1
    return transformer, given, outputs


def test_a_second_attention_falls_back_on_its_own_output() -> None:
    """SD3.5 has two of them in some blocks; step 1 sees the input of step 0, so that block 0 stores what it merges."""
    config = SDTMCached(0.75, 0.0, switch=1.0, blend=1.0)
    transformer, _, outputs = joint("sd3", config, dual_attention_layers=(0,))
    method, calls = method_of(transformer), len(outputs) // 2
    assert {place for place in method.results if place[:2] == (0, "self_attention")} == {
        (0, "self_attention", 0),
        (0, "self_attention", 1),
    }
    run = attachment(transformer).run
    assert run is not None
    assert sum(result.numel() for _, result in method.results.values()) == 2 * method.stored_numbers(run)
    assert method.present is not None
    vanished = torch.ones(2, 16, dtype=torch.bool).scatter(1, method.present.index, False)
    second = (outputs[1], outputs[calls + 1])
    assert torch.equal(second[0][vanished], second[1][vanished])
    assert not torch.allclose(second[0][~vanished], second[1][~vanished], atol=1e-4)
    first = (outputs[0][0], outputs[calls][0])
    assert torch.equal(first[0][vanished], first[1][vanished])
    assert not torch.allclose(first[0], second[0], atol=1e-4)


@pytest.mark.parametrize(("family", "layer"), [("sd3", 0), ("flux", 0), ("flux", 1)])
def test_a_prompt_weight_of_two_is_the_text_twice(family: str, layer: int) -> None:
    """Against the stock attention on the merged tokens with every text token doubled as a key."""
    config = diffratio.SDTM(0.6, 0.0, switch=1.0, layers=(layer,), prompt_weight=2.0)
    changes = {"dual_attention_layers": ()} if family == "sd3" else {}
    transformer, given, outputs = joint(family, config, **changes)
    backbone = get_backbone(family)
    calls = len(outputs) // 2
    method: Any = attachment(transformer).token_method
    plan, arguments, output = method.present, given[calls + layer], outputs[calls + layer]
    torch.manual_seed(0)
    own: Any = backbone.blocks(backbone.tiny(**changes).eval())[layer].attn
    double = arguments.get("encoder_hidden_states") is not None
    x = arguments["hidden_states"]
    text, image = (arguments["encoder_hidden_states"], x) if double else (x[:, :5], x[:, 5:])
    merged = plan.reduce(image)
    assert merged.shape[1] < 16
    for i in range(2):
        words, tokens = torch.cat([text[i : i + 1]] * 2, dim=1), merged[i : i + 1]
        more = {}
        if family == "flux":
            rows = torch.cat([torch.arange(5), torch.arange(5), 5 + plan.index[i]])
            more = {"image_rotary_emb": tuple(one[rows] for one in arguments["image_rotary_emb"])}
        with torch.no_grad():
            if double:
                expected, expected_text = own(hidden_states=tokens, encoder_hidden_states=words, **more)
                found, found_text = output
            else:
                both = own(torch.cat([words, tokens], dim=1), **more)
                expected, expected_text, found, found_text = both[:, 10:], both[:, :5], output[:, 5:], output[:, :5]
        torch.testing.assert_close(found[i], expected[0, plan.slots[i]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found_text[i], expected_text[0, :5], atol=1e-5, rtol=1e-5)


def test_the_prompt_weight_is_for_structure_steps_that_merge() -> None:
    torch.manual_seed(0)
    sd3 = get_backbone("sd3").tiny()
    method = SDTMCachedMethod(SDTMCached(prompt_weight=3.0, detail_sites=BOTH), describe(sd3))
    x = torch.randn(2, 36, 16)
    seen: dict[int, list[list[float]]] = {}
    for step in range(9):
        ctx = context(step, steps=9)
        method.begin_step(ctx)
        method.plan(0, "block", x, ctx)
        for site in ("self_attention", "self_attention", "feed_forward"):
            plan: Any = method.plan(0, site, x, ctx)
            if plan is not None:
                plan.restore(plan.reduce(x), x)
                seen.setdefault(step, []).append([round(one.unique().item(), 5) for one in plan.arguments().values()])
        method.end_step(torch.empty(0), ctx)
    plain: list[list[float]] = [[], [], []]
    weighed = [[round(-math.log(3), 5)], [], []]  # the second attention has no text keys
    assert seen == {step: weighed if step in (1, 2) else plain for step in range(9)}


@pytest.mark.parametrize(("family", "why"), [("dit", "none"), ("pixart", "text keys alone.*equal weight cancels")])
def test_a_prompt_weight_that_would_change_nothing_is_refused(family: str, why: str) -> None:
    for name, config in (("sdtm", diffratio.SDTM(prompt_weight=2)), ("sdtm_cached", SDTMCached(prompt_weight=2))):
        with pytest.raises(DiffratioError, match=rf"{name}: prompt_weight 2 .*{family} has {why}.*leave it at 1"):
            diffratio.apply_(get_backbone(family).tiny(), config)


def test_lower_budgets_store_less_often() -> None:
    transformer, run = dit(num_layers=6, num_attention_heads=4, attention_head_dim=16), uniform_run(20, GRID)
    found = [diffratio.for_budget("sdtm_cached", transformer, budget, run=run) for budget in (0.9, 0.7, 0.5, 0.4)]
    intervals = [config.refresh for config in found]  # type: ignore[attr-defined]
    assert intervals[0] == 3 and intervals == sorted(intervals) and intervals[-1] > 3
    assert found[0].as_published and not found[-1].as_published
    for budget, config in zip((0.9, 0.7, 0.5, 0.4), found, strict=True):
        fraction = get_method("sdtm_cached")(config, describe(transformer)).macs(run).fraction
        assert budget - 0.01 <= fraction <= budget + 1e-9
    with pytest.raises(diffratio.BudgetUnreachable, match="the first step is dense"):
        diffratio.for_budget("sdtm_cached", transformer, 0.1, run=run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": 0}, "sdtm_cached: refresh must be an integer of at least 1"),
        ({"refresh": 2.5}, "sdtm_cached: refresh must be an integer"),
        ({"blend": 1.1}, r"sdtm_cached: blend 1.1 is outside \[0, 1\]"),
        ({"prompt_weight": 0}, r"sdtm_cached: prompt_weight 0 is outside \[0.001, 1000\]"),
        ({"ratio": 0.8}, r"sdtm_cached: ratio 0.8 is outside \[0, 0.75\]"),
        ({"variant": "papers"}, "unknown sdtm_cached variant.*did you mean paper"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        SDTMCached(**settings)
    assert "\n" not in str(caught.value)


def test_another_cache_is_refused() -> None:
    for cache in (diffratio.BlockCache(), diffratio.BlockCache(actions=("C", "S"))):
        for order in ([cache, SDTMCached()], [SDTMCached(), cache]):
            with pytest.raises(DiffratioError, match="sdtm_cached and block_cache both keep outputs.*take sdtm"):
                diffratio.apply_(dit(), order)
