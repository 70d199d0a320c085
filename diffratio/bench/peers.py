"""Other people's tools on the same weights: what attaches to a DiT is run by its own code, what does not says why."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from diffratio.backbones import backbone_of
from diffratio.bench.models import counted_macs, shared_copy
from diffratio.bench.table import first_line
from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, unknown

NOT_ATTACHED = "does not attach"
Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Peer:
    """A tool that is compared with.

    Args:
        module: what is imported.
        attach: (transformer, run, knob) -> what every sampling run must stand in; changes the transformer.
        knobs: its settings from mild to strong, as `attach` takes them.
        install: how to get it.
        planning: (description, run, knob) -> its own arithmetic / dense MACs, which the count does not see.
    """

    module: str
    attach: Callable[[Any, SamplingRun, Any], Around]
    knobs: Sequence[Any]
    install: str = "pip install 'diffratio[peers]'"
    planning: Callable[[Description, SamplingRun, Any], float] = lambda description, run, knob: 0.0


@dataclass(frozen=True)
class Fitted:
    """A peer on its own copy of the model, at the setting that comes nearest to the budget from below.

    Args:
        transformer: with the peer attached; None where it does not attach.
        around: what every sampling run must stand in.
        macs: counted MACs / dense MACs.
        knob: the setting.
        status: `measured` once it is timed, or in a word or two why it cannot be.
        note: more on that, and where it cannot meet the budget.
    """

    transformer: Any = None
    around: Around = contextlib.nullcontext
    macs: float | None = None
    knob: Any = None
    status: str = "measured"
    note: str = ""


def fit(
    name: str,
    transformer: Any,
    run: SamplingRun,
    budget: float,
    prepare: Callable[[Any], Any],
    call: Callable[[Any], Callable[[], object]],
    samples: int,
) -> Fitted:
    """Attaches a peer at the mildest of its settings that costs no more than the budget.

    Settings are searched by halving, since a stronger one costs no more; costs are counted during a sampling run.

    Args:
        name: key of `PEERS`.
        transformer: a dense DiT; untouched.
        run: the dense run.
        budget: fraction of its MACs.
        prepare: what is done to a copy before the peer gets it, in place (compiling).
        call: transformer -> one sampling run with it.
        samples: how many samples that makes.

    Raises:
        DiffratioError: no peer of that name.
    """
    if name not in PEERS:
        raise unknown("peer", name, PEERS)
    peer = PEERS[name]
    if find_spec(peer.module) is None:
        return Fitted(status="not installed", note=peer.install)
    description = backbone_of(transformer).describe(transformer)
    try:
        knobs = peer.knobs or _tome_knobs(description, run, budget)
        low, high = 0, len(knobs) - 1
        strongest = _cost(peer, transformer, description, run, knobs[high], call, samples)
        costs = {high: strongest}
        if strongest >= 1:
            return Fitted(status=NOT_ATTACHED, note="it ran, and nothing was skipped at its strongest setting")
        while low < high:
            middle = (low + high) // 2
            costs[middle] = _cost(peer, transformer, description, run, knobs[middle], call, samples)
            low, high = (low, middle) if costs[middle] <= budget else (middle + 1, high)
        copy = prepare(shared_copy(transformer))
        around = peer.attach(copy, run, knobs[high])
    except BudgetUnreachable as error:
        return Fitted(status="unreachable", note=str(error))
    except Exception as error:  # whatever it raises is its answer to being attached to a DiT
        return Fitted(status=NOT_ATTACHED, note=first_line(error))
    over = costs[high] > budget
    note = f"misses the budget of {budget:g}: its strongest setting costs {costs[high]:.3f}" if over else ""
    return Fitted(copy, around, costs[high], knobs[high], note=note)


def _cost(
    peer: Peer,
    transformer: Any,
    description: Description,
    run: SamplingRun,
    knob: Any,
    call: Callable[[Any], Callable[[], object]],
    samples: int,
) -> float:
    copy = shared_copy(transformer)
    around = peer.attach(copy, run, knob)
    sample = call(copy)

    def inside() -> None:
        with around():
            sample()

    planning = peer.planning(description, run, knob)
    return counted_macs(copy, description, run, samples, inside) + planning


def _tome_knobs(description: Description, run: SamplingRun, budget: float) -> list[Any]:
    """tomesd has the knobs of our `tome` but `mix`: the same budget is solved by the same table, rounded up."""
    from diffratio.methods.tome import ToMeMethod

    config, tokens = ToMeMethod.for_budget(description, run, budget), run.grid.tokens
    if config.mix:
        config = replace(config, mix=False, ratio=math.ceil(config.ratio * tokens - 1e-9) / tokens)
    return [config]


def _tome_planning(description: Description, run: SamplingRun, config: Any) -> float:
    """It matches the same tokens as our `tome`, so it pays the same."""
    cost = config.method(config, description).macs(run)
    return float(cost.planning / cost.dense)


def _tomesd(transformer: Any, run: SamplingRun, config: Any) -> Around:
    import tomesd

    tomesd.apply_patch(
        transformer,
        ratio=config.ratio,
        max_downsample=transformer.config.patch_size,  # it thinks in pixels of a UNet: tokens are patches of them
        merge_attn="self_attention" in config.sites,
        merge_mlp="feed_forward" in config.sites,
    )
    blocks: list[Any] = list(backbone_of(transformer).blocks(transformer))
    for layer, block in enumerate(blocks):
        if config.layers is not None and layer not in config.layers:
            block.__class__ = block._parent
    return contextlib.nullcontext


def _cache_dit(transformer: Any, run: SamplingRun, threshold: float) -> Around:
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    for name in list(logging.root.manager.loggerDict):
        if name.upper().replace("-", "_").startswith("CACHE_DIT"):
            logging.getLogger(name).setLevel(logging.ERROR)
    settings = cache_dit.DBCacheConfig(
        num_inference_steps=run.steps,
        max_warmup_steps=1,
        residual_diff_threshold=threshold,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
    )
    adapter = cache_dit.BlockAdapter(
        transformer=transformer,
        blocks=transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=DiTPatchFunctor(),
        has_separate_cfg=False,
    )
    cache_dit.enable_cache(adapter, cache_config=settings)

    @contextlib.contextmanager
    def around() -> Any:
        cache_dit.refresh_context(transformer, num_inference_steps=run.steps)
        yield

    return around


def _hooked(apply: str, config: Callable[[Any, SamplingRun, Any, Any], Any]) -> Callable[..., Around]:
    """A cache of diffusers by its own `apply_...`: DiT lacks `enable_cache`, but its blocks take the hooks.

    Args:
        apply: name of the function in `diffusers.hooks`.
        config: (diffusers.hooks, run, knob, transformer) -> the cache's config.
    """

    def attach(transformer: Any, run: SamplingRun, knob: Any) -> Around:
        hooks = importlib.import_module("diffusers.hooks")
        from diffusers.models.cache_utils import CacheMixin

        getattr(hooks, apply)(transformer, config(hooks, run, knob, transformer))

        @contextlib.contextmanager
        def around() -> Any:
            """As diffusers' pipelines do: state reset before a run, a context for every step."""
            hooks.HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks(recurse=True)
            steps = enumerate(run.noise_levels)
            with contextlib.ExitStack() as present:

                def begin(*_: Any) -> None:
                    index, level = next(steps)
                    present.close()
                    context = CacheMixin.cache_context(
                        transformer, "run", step_index=index, sigma=level, num_inference_steps=run.steps
                    )
                    present.enter_context(context)

                handle = transformer.register_forward_pre_hook(begin)
                try:
                    yield
                finally:
                    handle.remove()

        return around

    return attach


def _attention_skips(apply: str, config: str) -> Callable[..., Around]:
    """A cache that leaves self-attention out for the knob's number of steps, in all of the run."""
    return _hooked(
        apply,
        lambda hooks, run, knob, _: getattr(hooks, config)(
            spatial_attention_block_skip_range=knob,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        ),
    )


THRESHOLDS = (*(0.002 * 1.4**i for i in range(24)), 1e6)
SKIPS = (2, 3, 4, 5, 8)

PEERS: dict[str, Peer] = {
    "tomesd": Peer("tomesd", _tomesd, (), planning=_tome_planning),
    "cache_dit": Peer("cache_dit", _cache_dit, THRESHOLDS),
    "first_block_cache": Peer(
        "diffusers",
        _hooked("apply_first_block_cache", lambda hooks, run, knob, _: hooks.FirstBlockCacheConfig(threshold=knob)),
        THRESHOLDS,
    ),
    # ratios of one stand for a calibration: its skips are then set by their number alone, which is all that time sees
    "mag_cache": Peer(
        "diffusers",
        _hooked(
            "apply_mag_cache",
            lambda hooks, run, knob, _: hooks.MagCacheConfig(
                num_inference_steps=run.steps, mag_ratios=[1.0] * run.steps, max_skip_steps=knob
            ),
        ),
        (1, 2, 3, 4, 6),
    ),
    "pyramid_attention_broadcast": Peer(
        "diffusers",
        _attention_skips("apply_pyramid_attention_broadcast", "PyramidAttentionBroadcastConfig"),
        SKIPS,
    ),
    "faster_cache": Peer(
        "diffusers",
        _attention_skips("apply_faster_cache", "FasterCacheConfig"),
        SKIPS,
    ),
    "taylorseer_cache": Peer(
        "diffusers",
        _hooked(
            "apply_taylorseer_cache",
            lambda hooks, run, knob, transformer: hooks.TaylorSeerCacheConfig(
                cache_interval=knob,
                disable_cache_before_step=1,
                cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],  # by its own rule it finds nothing here
                taylor_factors_dtype=transformer.dtype,
            ),
        ),
        SKIPS,
    ),
    "sea_cache": Peer(
        "diffusers", _hooked("apply_sea_cache", lambda hooks, run, knob, _: hooks.SeaCacheConfig()), (None,)
    ),
}
