"""Caches of diffusers and cache-dit: how each is enabled in a transformer and taken out; none of them is rewritten."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from diffratio.errors import DiffratioError, unknown

TIMESTEPS = 1000  # caches of diffusers speak of timesteps of 0..1000
OUTSIDE = -1.0  # a timestep that lies in no window
THRESHOLD, INTERVAL = "threshold", "interval"
BLOCK = "block"
JOINT = ("sd3", "flux")


@dataclass(frozen=True)
class Target:
    """Where a cache goes.

    Args:
        transformer: of diffusers, converted or not.
        blocks: the blocks that the cache may skip, from the first on.
        modules: site -> its modules in those blocks, by (layer, module).
        steps: of the run; what a cache knows about steps is set for it.
        timestep: tells the present timestep, 0..1000.
    """

    transformer: Any
    blocks: Sequence[nn.Module]
    modules: Mapping[str, Sequence[tuple[int, nn.Module]]]
    steps: int
    timestep: Callable[[], float] = lambda: OUTSIDE


Enable = Callable[[Target, float, Mapping[str, Any]], Callable[[], None] | None]


@dataclass(frozen=True)
class Cache:
    """One cache.

    Args:
        enable: (target, knob, options) -> what takes it out again; None where removing its new hooks does.
        knob: its main setting, `threshold` (higher skips more, 0 nothing) or `interval` (higher skips more, 1 nothing).
        default: of the knob, the library's own.
        options: names and defaults of what can be set besides.
        sites: what it skips: whole blocks, or modules inside them by site.
        leaves: by family, how many of the last blocks it leaves out.
        whole: families on which it takes all blocks or none.
        refused: families that it does not work on, and why.
        package: module that must be importable.
        install: how to get it.
    """

    enable: Enable
    knob: str
    default: float
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = (BLOCK,)
    leaves: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    package: str = "diffusers"
    install: str = "pip install diffusers -c constraints.txt"

    @property
    def neutral(self) -> float:
        """The knob at which nothing is skipped."""
        return 0.0 if self.knob == THRESHOLD else 1.0


@dataclass
class Enabled:
    """A cache in a transformer.

    Args:
        transformer: where it is.
        hooks: what it registered: registry, name of the hook.
        undo: takes out what is no hook.
        fresh: modules that had no hook before; they are left without a trace.
    """

    transformer: Any
    hooks: list[tuple[Any, str]]
    undo: Callable[[], None] | None
    fresh: list[nn.Module]

    def reset(self) -> None:
        """Forgets what was kept from step to step."""
        for registry, _ in self.hooks:
            registry.reset_stateful_hooks(recurse=False)

    def disable(self) -> None:
        """Takes it out again."""
        for registry, name in reversed(self.hooks):
            registry.remove_hook(name, recurse=False)
        if self.undo is not None:
            self.undo()
        for module in self.fresh:
            module.__dict__.pop("_diffusers_hook", None)
            module.__dict__.pop("forward", None)
        _forget_children(self.transformer)


def cache_of(name: str) -> Cache:
    """The cache of that name.

    Raises:
        DiffratioError: there is none; the nearest names are given.
    """
    if name not in CACHES:
        raise unknown("external cache", name, CACHES)
    return CACHES[name]


def require(name: str) -> None:
    """Raises DiffratioError where the package of a cache is not installed."""
    cache = cache_of(name)
    if find_spec(cache.package) is None:
        raise DiffratioError(f"external cache {name!r} needs {cache.package.replace('_', '-')}: {cache.install}")


def check_family(name: str, family: str) -> None:
    """Raises DiffratioError for a pair of cache and family that is known not to work."""
    cache = cache_of(name)
    if family in cache.refused:
        fitting = ", ".join(one for one, other in CACHES.items() if family not in other.refused)
        raise DiffratioError(
            f"external cache {name!r} does not go with backbone {family!r}: {cache.refused[family]}; take {fitting}"
        )


def enable_(name: str, target: Target, knob: float, options: Mapping[str, Any] | None = None) -> Enabled:
    """Puts a cache into a transformer by its own library.

    Args:
        name: key of `CACHES`.
        target: where.
        knob: the main setting.
        options: others.

    Raises:
        DiffratioError: the package is missing, another cache is enabled, or the cache attached to nothing.
    """
    require(name)
    cache, transformer = cache_of(name), target.transformer
    if getattr(transformer, "is_cache_enabled", False):
        raise DiffratioError(f"{type(transformer).__name__} has a cache enabled: transformer.disable_cache() first")
    from diffusers.hooks import HookRegistry

    before = {id(module) for module in transformer.modules() if _registry(module) is not None}
    present = {(id(_registry(module)), hook) for module in transformer.modules() for hook in _names(module)}
    HookRegistry.check_if_exists_or_initialize(transformer)  # by it the hooks are told the present step

    def enabled(undo: Callable[[], None] | None = None) -> Enabled:
        modules = list(transformer.modules())
        hooks = [(_registry(one), hook) for one in modules for hook in _names(one)]
        new = [(registry, hook) for registry, hook in hooks if (id(registry), hook) not in present]
        fresh = [one for one in modules if _registry(one) is not None and id(one) not in before]
        return Enabled(transformer, new, undo, fresh)

    try:
        with _quiet():
            undo = cache.enable(target, knob, {**cache.options, **(options or {})})
    except (DiffratioError, TypeError, ValueError) as error:
        enabled().disable()
        if isinstance(error, DiffratioError):
            raise
        raise DiffratioError(f"external cache {name!r} refuses its settings: {str(error).splitlines()[0]}") from None
    found = enabled(undo)
    if not found.hooks and undo is None:
        found.disable()
        raise DiffratioError(
            f"external cache {name!r} registered no hook in {type(transformer).__name__}: it knows none of "
            f"{', '.join(sorted({type(block).__name__ for block in target.blocks}))}"
        )
    _forget_children(transformer)
    return found


def _registry(module: nn.Module) -> Any:
    return module.__dict__.get("_diffusers_hook")


def _names(module: nn.Module) -> list[str]:
    registry = _registry(module)
    return [] if registry is None else list(registry.hooks)


def _forget_children(transformer: nn.Module) -> None:
    """diffusers keeps a list of the modules that have hooks, by which it hands out the present step."""
    for module in transformer.modules():
        registry = _registry(module)
        if registry is not None:
            registry.invalidate_child_registries_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a library logs when a cache is enabled is what the caller asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def register_blocks(blocks: Sequence[nn.Module]) -> None:
    """Tells diffusers that blocks whose class was swapped in place take and return what their own class does."""
    from dataclasses import replace

    from diffusers.hooks._helpers import TransformerBlockRegistry

    for cls in {type(block) for block in blocks}:
        for base in cls.__mro__:
            try:
                metadata = TransformerBlockRegistry.get(base)
            except ValueError:
                continue
            if base is not cls:
                own = replace(cast(Any, metadata), _cached_parameter_indices=None)  # found anew for the class
                TransformerBlockRegistry.register(cls, own)
                own._cls = metadata._cls  # arguments are looked up in its signature; ours shows (*args, **kwargs)
            break


class _Range(nn.Module):
    """The blocks that a cache is handed, under a name by which diffusers looks for them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(blocks)


def _blocks_of(target: Target, least: int) -> nn.Module:
    if len(target.blocks) < least:
        raise DiffratioError(
            f"this cache needs at least {least} blocks and was given {len(target.blocks)}: raise blocks=, or take "
            "pyramid_attention_broadcast"
        )
    register_blocks(target.blocks)
    return _Range(target.blocks)


def _first_block(target: Target, knob: float, options: Mapping[str, Any]) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(_blocks_of(target, 2), FirstBlockCacheConfig(threshold=knob))


def _mag(target: Target, knob: float, options: Mapping[str, Any]) -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    measuring, ratios = bool(options["calibrate"]), options["mag_ratios"]
    if not measuring and ratios is None:
        raise DiffratioError(
            "mag_cache needs mag_ratios, which belong to the model: diffratio.for_budget('external_cache:mag_cache', "
            "...) measures them, or give options={'mag_ratios': [...]}"
        )
    config = MagCacheConfig(
        threshold=knob,
        max_skip_steps=options["max_skip_steps"] if knob > 0 else 0,  # ratios of exactly 1 are under any threshold
        retention_ratio=options["retention_ratio"],
        # while it measures, the run must not end: what was measured is printed and forgotten there
        num_inference_steps=target.steps + measuring,
        mag_ratios=None if measuring else torch.tensor([float(one) for one in ratios]),
        calibrate=measuring,
    )
    apply_mag_cache(_blocks_of(target, 2), config)


def measured_ratios(enabled: Enabled) -> tuple[float, ...]:
    """Magnitude ratios of the steps since the last reset, of a MagCache that was enabled to calibrate."""
    managers = [registry.get_hook(name).state_manager for registry, name in enabled.hooks if name.startswith("mag")]
    return tuple(float(one) for one in managers[0].get_state().calibration_ratios)


def _window(target: Target, options: Mapping[str, Any]) -> tuple[float, float]:
    """Timesteps between which may be skipped; both ends are outside for diffusers, and inside for us."""
    low, high = options["window"]
    return low * TIMESTEPS - 1e-3, high * TIMESTEPS + 1e-3


def _names_of(target: Target, *sites: str) -> list[str]:
    """Full names, as patterns, of the modules of sites."""
    wanted = {id(module) for site in sites for _, module in target.modules.get(site, ())}
    return [rf"^{re.escape(name)}$" for name, one in target.transformer.named_modules() if id(one) in wanted]


def _pyramid(target: Target, knob: float, options: Mapping[str, Any]) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    cross = options["cross_interval"]
    apply_pyramid_attention_broadcast(
        target.transformer,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(knob),
            cross_attention_block_skip_range=int(knob) if cross is None else int(cross),
            spatial_attention_timestep_skip_range=_window(target, options),  # type: ignore[arg-type]
            cross_attention_timestep_skip_range=_window(target, options),  # type: ignore[arg-type]
            spatial_attention_block_identifiers=tuple(_names_of(target, "self_attention")),
            cross_attention_block_identifiers=tuple(_names_of(target, "cross_attention")),
            current_timestep_callback=target.timestep,  # type: ignore[arg-type]
        ),
    )


def _faster(target: Target, knob: float, options: Mapping[str, Any]) -> None:
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    apply_faster_cache(
        target.transformer,
        FasterCacheConfig(
            spatial_attention_block_skip_range=int(knob),
            spatial_attention_timestep_skip_range=_window(target, options),  # type: ignore[arg-type]
            spatial_attention_block_identifiers=tuple(_names_of(target, "self_attention")),
            attention_weight_callback=lambda _: float(options["weight"]),
            tensor_format="BCHW",
            is_guidance_distilled=True,  # its other part guesses the unconditional half; guidance is the run's here
            current_timestep_callback=target.timestep,  # type: ignore[arg-type]
        ),
    )
    # at the transformer itself it does that other part alone
    target.transformer._diffusers_hook.remove_hook("faster_cache_denoiser", recurse=False)


def _taylorseer(target: Target, knob: float, options: Mapping[str, Any]) -> None:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    apply_taylorseer_cache(
        target.transformer,
        TaylorSeerCacheConfig(
            cache_interval=int(knob),
            disable_cache_before_step=options["full_steps"],
            max_order=options["max_order"],
            taylor_factors_dtype=target.transformer.dtype,
            # by its own rule it finds nothing in most families
            cache_identifiers=_names_of(target, *target.modules),
        ),
    )


def _cache_dit(target: Target, knob: float, options: Mapping[str, Any]) -> Callable[[], None]:
    with _quiet():
        import cache_dit

    transformer = target.transformer
    settings = cache_dit.DBCacheConfig(
        num_inference_steps=target.steps,
        max_warmup_steps=options["full_steps"],
        residual_diff_threshold=knob,
        Fn_compute_blocks=options["first_blocks"],
        Bn_compute_blocks=options["last_blocks"],
    )
    functor = None
    if type(transformer).__name__ == "DiTTransformer2DModel":  # whose forward reaches into its first block
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        functor = DiTPatchFunctor()
    adapter = cache_dit.BlockAdapter(
        transformer=transformer,
        blocks=transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=functor,
        has_separate_cfg=False,
    )
    with _quiet():
        cache_dit.enable_cache(adapter, cache_config=settings)

    def undo() -> None:
        with _quiet():
            cache_dit.disable_cache(transformer)

    return undo


_SITES = ("self_attention", "cross_attention", "feed_forward")
CACHES: dict[str, Cache] = {
    "first_block_cache": Cache(
        _first_block,
        THRESHOLD,
        0.05,
        leaves={"sd3": 1},  # it takes differences of the text that leaves its last block, and sd3's gives none
    ),
    "mag_cache": Cache(
        _mag,
        THRESHOLD,
        0.06,
        {"mag_ratios": None, "max_skip_steps": 3, "retention_ratio": 0.2, "calibrate": False},
        whole=JOINT,  # it keeps no text, which a block behind its range would read
    ),
    "pyramid_attention_broadcast": Cache(
        _pyramid,
        INTERVAL,
        2,
        {"cross_interval": None, "window": (0.1, 0.8)},
        ("self_attention", "cross_attention"),
    ),
    "faster_cache": Cache(_faster, INTERVAL, 2, {"weight": 0.5, "window": (0.0, 0.681)}, ("self_attention",)),
    "taylorseer_cache": Cache(_taylorseer, INTERVAL, 5, {"full_steps": 3, "max_order": 1}, _SITES),
    "cache_dit": Cache(
        _cache_dit,
        THRESHOLD,
        0.08,
        {"first_blocks": 1, "last_blocks": 0, "full_steps": 1},
        refused={
            "dit": "it puts its own forward in the place of DiT's, and the run would not be followed",
            **dict.fromkeys(JOINT, "its adapter for blocks of two streams is not tied in here"),
        },
        package="cache_dit",
        install="pip install 'diffratio[peers]'",
    ),
}
