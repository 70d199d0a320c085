"""Other people's tools on the same weights: what attaches to a DiT is run by its own code, what does not says why."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from diffratio.backbones import backbone_of
from diffratio.bench.models import counted_macs, shared_copy
from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, kind_and_line, unknown
from diffratio.methods.external_caches import CACHES, OUTSIDE, TIMESTEPS, Target, enable_

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
        return Fitted(status=NOT_ATTACHED, note=kind_and_line(error, 160))
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


def _cached(name: str, **options: Any) -> Callable[..., Around]:
    """A cache by the code that attaches it for `external_cache`, in a plain transformer: none of ours is around it.

    Args:
        name: of the cache.
        **options: of it; a function of the run gives what depends on it.
    """

    def attach(transformer: Any, run: SamplingRun, knob: Any) -> Around:
        backbone = backbone_of(transformer)
        blocks = list(backbone.blocks(transformer))
        sites = [site for site in CACHES[name].sites if site in backbone.sites]
        modules = {
            site: [(layer, one) for layer, block in enumerate(blocks) for one in backbone.site_modules(block, site)]
            for site in sites
        }
        present = [OUTSIDE]
        target = Target(transformer, blocks, modules, run.steps, lambda: present[0])
        given = {key: value(run) if callable(value) else value for key, value in options.items()}
        enabled = enable_(name, target, knob, given)

        @contextlib.contextmanager
        def around() -> Any:
            """As diffusers' pipelines do: state reset before a run, a context for every step."""
            from diffusers.models.cache_utils import CacheMixin

            enabled.reset()
            if name == "cache_dit":
                import cache_dit

                cache_dit.refresh_context(transformer, num_inference_steps=run.steps)
            steps = enumerate(run.noise_levels)
            with contextlib.ExitStack() as opened:

                def begin(*_: Any) -> None:
                    index, level = next(steps)
                    present[0] = level * TIMESTEPS if index else OUTSIDE
                    opened.close()
                    context = CacheMixin.cache_context(
                        transformer, "run", step_index=index, sigma=level, num_inference_steps=run.steps
                    )
                    opened.enter_context(context)

                handle = transformer.register_forward_pre_hook(begin)
                try:
                    yield
                finally:
                    handle.remove()

        return around

    return attach


def _sea_cache(transformer: Any, run: SamplingRun, knob: Any) -> Around:
    """diffusers' SeaCache reads videos: what it says to a DiT is in its note."""
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache
    from diffusers.models.cache_utils import CacheMixin

    apply_sea_cache(transformer, SeaCacheConfig())
    return lambda: CacheMixin.cache_context(transformer, "run")


THRESHOLDS = (*(0.002 * 1.4**i for i in range(24)), 1e6)
SKIPS = (2, 3, 4, 5, 8)

PEERS: dict[str, Peer] = {
    "tomesd": Peer("tomesd", _tomesd, (), planning=_tome_planning),
    "cache_dit": Peer("cache_dit", _cached("cache_dit"), THRESHOLDS),
    "first_block_cache": Peer("diffusers", _cached("first_block_cache"), THRESHOLDS),
    # ratios of one stand for a calibration: its skips are then set by their number alone, which is all that time sees
    "mag_cache": Peer(
        "diffusers",
        lambda transformer, run, knob: _cached(
            "mag_cache", mag_ratios=lambda run: (1.0,) * run.steps, max_skip_steps=knob
        )(transformer, run, 1.0),
        (1, 2, 3, 4, 6),
    ),
    "pyramid_attention_broadcast": Peer("diffusers", _cached("pyramid_attention_broadcast", window=(0.0, 1.0)), SKIPS),
    "faster_cache": Peer("diffusers", _cached("faster_cache", window=(0.0, 1.0)), SKIPS),
    "taylorseer_cache": Peer("diffusers", _cached("taylorseer_cache", full_steps=1), SKIPS),
    "sea_cache": Peer("diffusers", _sea_cache, (None,)),
}
