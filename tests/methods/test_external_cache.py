"""Caches of other libraries: they skip, cost what is counted, start anew with every run, and leave nothing behind."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import diffratio
from diffratio import surgery
from diffratio.backbones import backbone_of, get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods import external_caches, get_method
from diffratio.methods.external_cache import ExternalCacheMethod
from diffratio.methods.external_caches import CACHES
from diffratio.surgery import attachment, measuring

STEPS = 6
ALWAYS = {"window": (0.0, 1.0)}
OPTIONS: dict[str, dict[str, Any]] = {
    "mag_cache": {"mag_ratios": (1.0,) * STEPS},
    "pyramid_attention_broadcast": ALWAYS,
    "faster_cache": ALWAYS,
    "taylorseer_cache": {"full_steps": 1},
}
INSTALLED = [name for name, cache in CACHES.items() if find_spec(cache.package)]
FAMILIES = ("dit", "pixart", "sd3", "flux")
PAIRS = [(name, family) for family in FAMILIES for name in INSTALLED if family not in CACHES[name].refused]
DIT = [name for name in INSTALLED if "dit" not in CACHES[name].refused]


def model(family: str = "dit", **changes: Any) -> Any:
    torch.manual_seed(0)
    return get_backbone(family).tiny(**({} if family == "flux" else {"num_layers": 4}) | changes).eval()


def run_of(transformer: Any, steps: int = STEPS) -> SamplingRun:
    run = backbone_of(transformer).default_run(transformer, steps, "none")
    return replace(run, text_tokens=5) if run.text_tokens else run


def loose(name: str, **changes: Any) -> diffratio.ExternalCache:
    """Skips a lot."""
    knob: dict[str, Any] = {"threshold": 1.0} if CACHES[name].knob == "threshold" else {"interval": 3}
    return diffratio.ExternalCache(name, **knob, options=OPTIONS.get(name, {}), **changes)


def outputs(transformer: Any, seed: int = 0) -> Tensor:
    """Predictions of all steps (S, B, ...), of the latents that measuring takes."""
    found: list[Tensor] = []
    handle = transformer.register_forward_hook(lambda _, args, out: found.append(out[0]))
    if surgery.is_applied(transformer):
        measuring.sample_run(transformer, run_of(transformer), 2, seed)
    else:
        applied = diffratio.apply_(transformer, diffratio.Dense())
        measuring.sample_run(applied, run_of(transformer), 2, seed)
        diffratio.remove_(applied)
    handle.remove()
    return torch.stack(found)


def traces_of_hooks(transformer: Any) -> list[str]:
    return [n for n, one in transformer.named_modules() if {"forward", "_diffusers_hook"} & set(vars(one))]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_loose_cache_skips_costs_what_is_counted_and_starts_anew(name: str, family: str) -> None:
    transformer = model(family)
    dense, run = outputs(transformer), run_of(transformer)
    diffratio.apply_(transformer, loose(name))
    first = outputs(transformer)
    cost = diffratio.macs(transformer, run=run)
    assert 0.2 < cost.fraction < 0.95
    assert first.isfinite().all() and not torch.allclose(first, dense, atol=1e-4)
    assert torch.equal(first[0], dense[0])  # nothing is there to take at the first step
    assert torch.equal(outputs(transformer), first)
    counted = count_macs(transformer, lambda: measuring.sample_run(transformer, run, 2))
    assert counted == 2 * cost.total  # two samples
    assert cost.dense == get_method("dense")(diffratio.Dense(), surgery.describe(transformer)).macs(run).total
    diffratio.remove_(transformer)
    assert traces_of_hooks(transformer) == []
    assert torch.equal(outputs(transformer), dense)


@pytest.mark.parametrize(("name", "family"), [pair for pair in PAIRS if pair[1] in ("pixart", "flux")])
def test_a_neutral_knob_is_the_dense_model(name: str, family: str) -> None:
    transformer = model(family)
    dense = outputs(transformer)
    diffratio.apply_(transformer, loose(name).at(CACHES[name].neutral))
    torch.testing.assert_close(outputs(transformer), dense, atol=1e-6, rtol=0)
    assert diffratio.macs(transformer, run=run_of(transformer)).fraction == 1.0


def test_the_summary_and_the_statistics_say_what_was_skipped() -> None:
    transformer, run = model(), run_of(model())
    diffratio.apply_(transformer, loose("first_block_cache"))
    found = diffratio.summary(transformer, run=run)
    assert "measured" in found and "hit rate" in found
    figures = surgery.statistics(transformer, run)
    # everything but step 0 is skipped from the second of four blocks on
    assert figures["skipped"] == 3 * (STEPS - 1) and figures["full_steps"] == 1 and figures["samples"] == 2
    assert figures["hit_rate"] == pytest.approx(3 * (STEPS - 1) / (4 * STEPS))
    assert surgery.is_measured(transformer)
    assert not surgery.is_measured(diffratio.apply_(model(), diffratio.ToMe(0.5)))


@pytest.mark.parametrize("blocks", [0.5, 1.0])
def test_a_range_of_blocks_leaves_the_others_alone(blocks: float) -> None:
    transformer = diffratio.apply_(model(), loose("first_block_cache", blocks=blocks))
    outputs(transformer)
    (trace,) = attachment(transformer).token_method.traces(STEPS)
    assert {layer for layer, _ in trace[1]} == set(range(1, round(4 * blocks)))
    assert attachment(transformer).token_method.config.as_published == (blocks == 1.0)


@pytest.mark.parametrize("name", [one for one in DIT if one != "cache_dit"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_a_copy_runs_its_own_weights_and_keeps_its_own_state(name: str, again: Any) -> None:
    transformer = diffratio.apply_(model(), loose(name))
    twin = again(transformer)
    before = outputs(transformer)
    assert torch.equal(outputs(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    changed = outputs(twin)
    assert torch.equal(outputs(transformer), before) and not torch.allclose(changed, before, atol=1e-3)
    diffratio.remove_(twin)
    assert traces_of_hooks(twin) == []


@pytest.mark.parametrize("name", ["first_block_cache", "mag_cache"])
def test_block_caches_go_on_top_of_token_methods(name: str) -> None:
    run = run_of(model())
    for token_level in (diffratio.ToMe(ratio=0.5), diffratio.MoD(keep=0.5)):
        transformer = diffratio.apply_(model(), token_level)
        alone = diffratio.macs(transformer, run=run)
        diffratio.apply_(transformer, loose(name))
        outputs(transformer)
        cost = diffratio.macs(transformer, run=run)
        counted = count_macs(transformer, lambda transformer=transformer: measuring.sample_run(transformer, run, 1))
        uncounted = cost.planning if isinstance(token_level, diffratio.MoD) else 0
        assert counted == pytest.approx(cost.total - uncounted, rel=1e-3)
        assert cost.total < alone.total < cost.dense
        diffratio.remove_(transformer)
        assert traces_of_hooks(transformer) == []


@pytest.mark.parametrize(
    ("name", "other", "why"),
    [
        ("first_block_cache", diffratio.BlockCache(), "both decide what is computed"),
        ("first_block_cache", diffratio.GuidanceInterval(skip=2), "a step without guidance"),
        ("first_block_cache", diffratio.DaTo(), "both decide what is computed"),
        ("pyramid_attention_broadcast", diffratio.ToMe(ratio=0.5), "take first_block_cache"),
        ("taylorseer_cache", diffratio.MoD(keep=0.5), "take first_block_cache"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, other: Any, why: str) -> None:
    transformer = model()
    with pytest.raises(DiffratioError, match=why):
        diffratio.apply_(transformer, [loose(name), other])
    assert not surgery.is_applied(transformer) and traces_of_hooks(transformer) == []


def test_a_refused_cache_leaves_the_method_below_it() -> None:
    transformer = diffratio.apply_(model(), diffratio.ToMe(ratio=0.5))
    with pytest.raises(DiffratioError, match="needs mag_ratios"):
        diffratio.apply_(transformer, diffratio.ExternalCache("mag_cache"))
    assert [one.name for one in attachment(transformer).methods] == ["tome"]
    assert traces_of_hooks(transformer) == []


def test_no_hook_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CACHES, "first_block_cache", replace(CACHES["first_block_cache"], enable=lambda *_: None))
    transformer = model()
    with pytest.raises(DiffratioError, match="registered no hook in DiTTransformer2DModel"):
        diffratio.apply_(transformer, loose("first_block_cache"))
    assert not surgery.is_applied(transformer) and traces_of_hooks(transformer) == []


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_caches, "find_spec", lambda name: None)
    with pytest.raises(DiffratioError, match=r"'cache_dit' needs cache-dit: pip install 'diffratio\[peers\]'"):
        diffratio.apply_(model("pixart"), diffratio.ExternalCache("cache_dit"))


def test_a_cache_that_was_enabled_before_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    transformer = model("flux")
    transformer.enable_cache(FirstBlockCacheConfig(0.1))
    with pytest.raises(DiffratioError, match="disable_cache"):
        diffratio.apply_(transformer, loose("first_block_cache"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache": "first_block"}, "unknown external cache 'first_block': did you mean first_block_cache"),
        ({"interval": 2}, "interval 2 was given, and the knob of first_block_cache is threshold"),
        ({"cache": "taylorseer_cache", "threshold": 0.1}, "knob of taylorseer_cache is interval"),
        ({"threshold": -1}, "must be a number from 0"),
        ({"cache": "taylorseer_cache", "interval": 0}, "must be an integer from 1"),
        ({"blocks": 0}, r"outside \(0, 1\]"),
        ({"options": {"treshold": 1}}, "unknown option of external cache 'first_block_cache' 'treshold'"),
        ({"options": 3}, "must be a mapping"),
        ({"cache": "cache_dit", "blocks": 0.5}, "set last_blocks"),
    ],
)
def test_bad_configs_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        diffratio.ExternalCache(**values)
    assert "\n" not in str(caught.value)


def test_known_bad_pairs_are_refused_by_name() -> None:
    with pytest.raises(DiffratioError, match="'cache_dit' does not go with backbone 'sd3'"):
        diffratio.apply_(model("sd3"), diffratio.ExternalCache("cache_dit"))
    with pytest.raises(DiffratioError, match="leave blocks 0.5 at 1"):
        diffratio.apply_(model("flux"), loose("mag_cache", blocks=0.5))


def test_separate_halves_are_refused() -> None:
    transformer = diffratio.apply_(model(), loose("first_block_cache"))
    state = attachment(transformer)
    state.halves = "uncond"
    state.open_run(run_of(transformer))
    with pytest.raises(DiffratioError, match="both guidance halves in one batch"):
        transformer(torch.randn(2, 1, 8, 8), timestep=torch.ones(2), class_labels=torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("name", [one for one in DIT if one != "cache_dit"])
def test_budgets_are_met_on_counted_runs(name: str) -> None:
    coarse = {"pyramid_attention_broadcast": 0.9, "faster_cache": 0.9, "taylorseer_cache": 0.765}
    transformer, budget = model(num_layers=6), coarse.get(name, 0.76)
    run = run_of(transformer, 10)
    config: Any = diffratio.for_budget(f"external_cache:{name}", transformer, budget, run=run)
    assert config.cache == name and not surgery.is_applied(transformer)
    diffratio.apply_(transformer, config)
    assert budget - 0.01 <= diffratio.macs(transformer, run=run).fraction <= budget
    if name == "mag_cache":  # measured on this model: 1 at first, and then what its residuals do
        ratios = config.options["mag_ratios"]
        assert len(ratios) == 10 and ratios[0] == 1.0 and len(set(ratios)) > 5


def test_a_budget_out_of_reach_tells_the_range() -> None:
    transformer = model()
    with pytest.raises(BudgetUnreachable, match=r"external_cache \(taylorseer_cache\) cannot reach") as caught:
        diffratio.for_budget("external_cache:taylorseer_cache", transformer, 0.1, run=run_of(transformer))
    low, high = caught.value.reachable
    assert 0.1 < low < high == 1.0


def test_a_budget_of_one_skips_nothing() -> None:
    transformer = model()
    config: Any = diffratio.for_budget("external_cache", transformer, 1.0, run=run_of(transformer))
    assert config.cache == "first_block_cache" and config.threshold == 0.0


def test_variants_are_named_exactly() -> None:
    assert get_method("external_cache:mag_cache") is ExternalCacheMethod
    with pytest.raises(DiffratioError, match="variant of method 'external_cache' 'mag': did you mean mag_cache"):
        get_method("external_cache:mag")
    with pytest.raises(DiffratioError, match="method 'tome' has no variants"):
        get_method("tome:fast")


def test_a_description_alone_cannot_be_priced() -> None:
    transformer = model()
    description, run = surgery.describe(transformer), run_of(transformer)
    with pytest.raises(DiffratioError, match="depends on the input"):
        ExternalCacheMethod(diffratio.ExternalCache(), description).macs(run)
    with pytest.raises(DiffratioError, match="depends on the input"):
        ExternalCacheMethod.for_budget(description, run, 0.5)
