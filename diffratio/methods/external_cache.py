"""`external_cache`: the caches of diffusers and cache-dit as a method; what they cost is counted while they run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffratio.cost.macs import BlockUse, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import DiffratioError, unknown
from diffratio.methods import external_caches as caches
from diffratio.methods.base import Measured, Method, MethodConfig, register
from diffratio.methods.calibration import first_within
from diffratio.methods.external_caches import BLOCK, INTERVAL, THRESHOLD, Enabled, Target

Place = tuple[int, str]  # a block, and a site in it or `block`
Trace = tuple[frozenset[Place], ...]  # by step, the places that were not computed
_STEPS = 20  # what a cache is enabled for until a run says how many steps it has


@dataclass(frozen=True)
class ExternalCache(MethodConfig):
    """A cache of diffusers or cache-dit, run by its own library.

    Args:
        cache: `first_block_cache`, `mag_cache`, `pyramid_attention_broadcast`, `faster_cache` (its attention part),
            `taylorseer_cache` (diffusers), or `cache_dit` (DBCache).
        threshold: of caches that decide by it, from 0; higher skips more, 0 nothing. None is the library's default.
        interval: of caches that compute every n-th time, from 1; higher skips more, 1 nothing. None is the default.
        blocks: fraction of the blocks, from the first on, that the cache works on, in (0, 1]; lower skips less. What is
            published is 1; budgets between two settings of the other knob are met by it.
        options: what else the cache takes; see `diffratio.methods.external_caches.CACHES`.
    """

    cache: str = "first_block_cache"
    threshold: float | None = None
    interval: int | None = None
    blocks: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        cache = caches.cache_of(self.cache)
        other = INTERVAL if cache.knob == THRESHOLD else THRESHOLD
        if getattr(self, other) is not None:
            given = f"{other} {getattr(self, other)!r}"
            raise DiffratioError(f"external_cache: {given} was given, and the knob of {self.cache} is {cache.knob}")
        threshold, interval = self.threshold, self.interval
        if threshold is not None and (
            not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold < float("inf")
        ):
            raise DiffratioError(f"external_cache: threshold {threshold!r} must be a number from 0; 0 skips nothing")
        if interval is not None and (type(interval) is not int or interval < 1):
            raise DiffratioError(f"external_cache: interval {interval!r} must be an integer from 1; 1 skips nothing")
        if not isinstance(self.blocks, int | float) or isinstance(self.blocks, bool) or not 0 < self.blocks <= 1:
            raise DiffratioError(f"external_cache: blocks {self.blocks!r} is outside (0, 1]; it is a fraction of them")
        if not isinstance(self.options, Mapping):
            raise DiffratioError(f"external_cache: options {self.options!r} must be a mapping, options={{name: value}}")
        for name in self.options:
            if name not in cache.options:
                raise unknown(f"option of external cache {self.cache!r}", name, cache.options)
        if self.cache == "cache_dit" and self.blocks != 1:
            raise DiffratioError("external_cache: cache_dit takes all blocks; leave blocks at 1 and set last_blocks")

    @property
    def knob(self) -> float:
        """The main setting, whatever its name."""
        own = self.threshold if caches.cache_of(self.cache).knob == THRESHOLD else self.interval
        return caches.cache_of(self.cache).default if own is None else own

    @property
    def as_published(self) -> bool:
        """Whether it works on all blocks."""
        return self.blocks == 1

    def at(self, knob: float, blocks: float = 1.0) -> ExternalCache:
        """The same cache at another setting."""
        if caches.cache_of(self.cache).knob == THRESHOLD:
            return replace(self, threshold=float(knob), blocks=blocks)
        return replace(self, interval=int(knob), blocks=blocks)


@register
class ExternalCacheMethod(Method):
    """Enables the cache, tells it run and step, and notes which blocks and sites are really computed."""

    name = "external_cache"
    config_class = ExternalCache
    stateful = True
    token_level = False
    static: ClassVar[bool] = False
    variants = tuple(caches.CACHES)

    def __init__(self, config: ExternalCache, description: Description) -> None:
        super().__init__(config, description)
        caches.check_family(config.cache, description.family)
        if config.blocks < 1 and description.family in caches.cache_of(config.cache).whole:
            raise DiffratioError(
                f"external_cache: {config.cache} on backbone {description.family} takes all blocks, since it keeps no "
                f"text: leave blocks {config.blocks!r} at 1"
            )
        caches.require(config.cache)
        self.cache = caches.cache_of(config.cache)
        self._target: Target | None = None
        self._enabled: Enabled | None = None
        self._timestep = caches.OUTSIDE
        self._context: contextlib.ExitStack | None = None
        self._hooked: frozenset[Place] = frozenset()
        self._ran: list[set[Place]] = []
        self._seen: set[int] = set()
        self._rows = 0
        self._traces: Counter[Trace] = Counter()
        self._shown: Trace | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one transformer; surgery attaches the method anew to a copy."""
        kept = {"_target": None, "_enabled": None, "_context": None}
        return {**self.__dict__, **kept}

    def check_beside(self, others: Sequence[Method]) -> None:
        """Two caches, changing batches, and tokens whose number changes under a cached module are refused."""
        for other in others:
            why = None
            if other.decides_steps or not other.static:
                why = "both decide what is computed"
            elif type(other).guided is not Method.guided:
                why = "cached results of both guidance halves do not fit a step without guidance"
            elif other.token_level and other.stateful:
                why = f"{other.name} must see every step"
            elif other.token_level and self.sites() and other.name != "dense":
                why = "it keeps results inside blocks, where the number of tokens changes; take first_block_cache"
            if why is not None:
                raise DiffratioError(f"external_cache ({self.config.cache}) does not go with {other.name}: {why}")

    def sites(self) -> tuple[str, ...]:
        """The sites that it may skip."""
        joint = self.description.family in caches.JOINT
        skipped = [site for site in self.cache.sites if site != BLOCK and not (joint and site == "feed_forward")]
        known = {site.name for block in self.description.blocks for site in block.sites}
        return tuple(site for site in skipped if site in known)

    def attach(
        self, transformer: Any, blocks: Sequence[nn.Module], modules_of: Callable[[nn.Module, str], list[nn.Module]]
    ) -> None:
        """Enables the cache, after all classes are swapped: it stands around what other methods do.

        Raises:
            DiffratioError: it attached to nothing, or another cache is enabled.
        """
        left = self.cache.leaves.get(self.description.family, 0)
        count = min(max(1, round(self.config.blocks * len(blocks))), len(blocks) - left)
        own = blocks[:count]
        sites = self.sites()
        modules = {site: [(n, one) for n, block in enumerate(own) for one in modules_of(block, site)] for site in sites}
        self._hooked = frozenset(
            [(n, site) for site in sites for n, _ in modules[site]] if sites else [(n, BLOCK) for n in range(count)]
        )
        self._target = Target(transformer, own, modules, _STEPS, lambda: self._timestep)
        self._enable()

    def detach(self) -> None:
        """Disables it; the transformer is as it was."""
        self._leave()
        if self._enabled is not None:
            self._enabled.disable()
        self._target = self._enabled = None

    def _enable(self) -> None:
        assert self._target is not None
        self._enabled = caches.enable_(self.config.cache, self._target, self.config.knob, self.config.options)

    def begin_run(self, run: SamplingRun) -> None:
        """Everything that was kept is forgotten; a cache that must know the number of steps is told it."""
        self._leave()
        self._ran, self._seen = [set() for _ in range(run.steps)], set()
        if self._target is None or self._enabled is None:
            return
        if self._target.steps != run.steps or self.config.cache == "cache_dit":
            self._enabled.disable()
            self._target = replace(self._target, steps=run.steps)
            self._enable()
        else:
            self._enabled.reset()

    def begin_step(self, ctx: StepContext) -> None:
        """Tells the cache where it is.

        Raises:
            DiffratioError: a guidance half, or the step once more, came in a forward of its own; caches would take it
                for the next step.
        """
        if ctx.halves in ("cond", "uncond"):
            raise DiffratioError(
                "external_cache needs both guidance halves in one batch; one of its own is taken for the next step"
            )
        if ctx.run is None or ctx.step is None or self._target is None:
            return None
        if torch.is_grad_enabled() and getattr(self._target.transformer, "gradient_checkpointing", False):
            raise DiffratioError(
                "external_cache: gradient checkpointing runs blocks twice, which a cache takes for another step; "
                "sample under torch.no_grad(), or transformer.disable_gradient_checkpointing() first"
            )
        self._leave()
        if ctx.step in self._seen:
            if ctx.step:
                raise DiffratioError(
                    f"external_cache: step {ctx.step} came twice, and a cache takes the second time for the next step; "
                    "take a sampler of one forward a step"
                )
            self.begin_run(ctx.run)  # before step 0 nothing was kept
        from diffusers.models.cache_utils import CacheMixin

        level = ctx.run.noise_levels[ctx.step]
        self._timestep = level * caches.TIMESTEPS if ctx.step else caches.OUTSIDE  # nothing is cached at step 0
        self._context = contextlib.ExitStack()
        context = CacheMixin.cache_context(
            self._target.transformer, "run", step_index=ctx.step, sigma=level, num_inference_steps=ctx.run.steps
        )
        self._context.enter_context(context)
        return None

    def see(self, sample: Tensor, ctx: StepContext) -> None:
        """Notes the batch."""
        self._rows = sample.shape[0]
        if ctx.step is not None:
            self._seen.add(ctx.step)

    def ran(self, layer: int, site: str, ctx: StepContext) -> None:
        """Notes what is computed."""
        if ctx.step is not None and ctx.step < len(self._ran):
            self._ran[ctx.step].add((layer, site))

    def end_step(self, output: Tensor, ctx: StepContext) -> None:
        """After the last step the run's trace is complete."""
        self._leave()
        if ctx.run is not None and ctx.step == ctx.run.steps - 1 and self._seen == set(range(ctx.run.steps)):
            self._traces[tuple(self._hooked - ran for ran in self._ran)] += self._rows

    def _leave(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def traces(self, steps: int) -> dict[Trace, int]:
        """What was skipped in complete runs of so many steps, with the number of samples that did so."""
        return {trace: rows for trace, rows in self._traces.items() if len(trace) == steps}

    def forget_traces(self) -> None:
        """Starts counting anew."""
        self._traces.clear()

    @contextlib.contextmanager
    def replaying(self, trace: Trace) -> Iterator[None]:
        """Costs asked for in here are those of one trace."""
        self._shown = trace
        try:
            yield
        finally:
            self._shown = None

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """By the trace that is replayed.

        Raises:
            DiffratioError: none is: the cost depends on the input.
        """
        if self._shown is None:
            raise DiffratioError(
                "external_cache costs what its cache skips, which depends on the input: diffratio.macs(transformer, "
                "run=run) counts it on a run"
            )
        skipped = {site for at, site in self._shown[step] if at == layer}
        return BlockUse(bypassed=BLOCK in skipped, skipped=tuple(sorted(skipped - {BLOCK})))

    def statistics(self, run: SamplingRun) -> dict[str, float]:
        """Of the samples that were counted: steps that skip nothing, and what is skipped, as means over samples."""
        traces = self.traces(run.steps)
        samples, places = sum(traces.values()), max(1, len(self._hooked))
        if not samples:
            return {}
        full = sum(rows * sum(not step for step in trace) for trace, rows in traces.items()) / samples
        skipped = sum(rows * sum(map(len, trace)) for trace, rows in traces.items()) / samples
        return {
            "steps": run.steps,
            "full_steps": full,
            "cached_places": places,
            "skipped": skipped,
            "hit_rate": skipped / (places * run.steps),
            "samples": samples / run.halves,
        }

    def ratios(self) -> tuple[float, ...]:
        """What a MagCache that was enabled to calibrate has measured since the run began."""
        assert self._enabled is not None and self._target is not None
        from diffusers.models.cache_utils import CacheMixin

        with CacheMixin.cache_context(self._target.transformer, "run"):
            return caches.measured_ratios(self._enabled)

    @classmethod
    def of_variant(cls, variant: str | None) -> ExternalCache:
        """The config of `external_cache:CACHE`."""
        return ExternalCache() if variant is None else ExternalCache(cache=variant)

    @classmethod
    def calibrate(
        cls, start: Any, measure: Callable[[MethodConfig], Measured], description: Description, budget: float
    ) -> MethodConfig:
        """The mildest knob within the budget; where it saves too much, on as few blocks as the budget asks for.

        Raises:
            BudgetUnreachable: no setting that was tried lies within [budget - 0.01, budget].
        """
        caches.check_family(start.cache, description.family)
        caches.require(start.cache)
        cache = caches.cache_of(start.cache)
        if start.cache == "mag_cache" and start.options.get("mag_ratios") is None:
            found: Any = measure(replace(start, threshold=0.0, options={**start.options, "calibrate": True})).method
            start = replace(start, options={**start.options, "mag_ratios": found.ratios()})
        layers = description.layers
        whole = start.cache == "cache_dit" or description.family in cache.whole
        return first_within(
            f"{cls.name} ({start.cache})",
            lambda knob, count: measure(start.at(knob, count / layers)).fraction,
            lambda knob, count: start.at(knob, count / layers),
            budget,
            neutral=cache.neutral,
            integers=cache.knob == INTERVAL,
            counts=() if whole else tuple(range(1 if cache.sites != (BLOCK,) else 2, layers + 1)),
            every=layers,
        )
