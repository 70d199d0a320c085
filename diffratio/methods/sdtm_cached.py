"""`sdtm_cached`: SDTM (arXiv 2505.11707) as its release caches: dense steps store what merged tokens fall back on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffratio.cost.macs import Description
from diffratio.cost.run import Halves, SamplingRun, StepContext
from diffratio.errors import DiffratioError
from diffratio.methods.base import Method, register
from diffratio.methods.merging import check_count, check_number, same_samples
from diffratio.methods.results import numbers_of_sites, of_halves
from diffratio.methods.sdtm import PUBLISHED_SITES, SDTM, STRUCTURE_SITES, Place, SDTMMethod, by_layers
from diffratio.tokens.plan import BlendPlan, MergePlan, Plan
from diffratio.tokens.pruning import StoredPlan, all_tokens

_REFRESH = 3
_WIDER = (4, 5, 6, 8, 10, 12, 16, 20, 30)  # further refresh intervals for budgets, and after them the whole run


@dataclass(frozen=True)
class SDTMCached(SDTM):
    """`sdtm` with dense steps in between, which store the outputs of attention and MLP before their gates.

    In the steps after them a token that was merged into another one takes `1 - blend` of what that one computed and
    `blend` of its own stored output; a group's destination, like a token alone, takes what was computed.

    Args:
        refresh: each n-th step, from the first, is dense and stores; higher stores less often, 1 is the dense model.
            Published: 3.
        blend: weight of the stored output, 0..1; 0 merges as `sdtm` does between the dense steps. Published: 0.9.
    """

    called: ClassVar[str] = "sdtm_cached"

    refresh: int = _REFRESH
    blend: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.called, "refresh", self.refresh, 1, "each n-th step is dense")
        check_number(self.called, "blend", self.blend, 0, 1, "it is the weight of the stored output")

    @property
    def as_published(self) -> bool:
        """Whether detail steps leave attention alone and outputs are stored as often as in the release."""
        return super().as_published and self.refresh <= _REFRESH

    def refreshes(self, step: int) -> bool:
        """Whether a step is dense and stores."""
        return step % self.refresh == 0


@register
class SDTMCachedMethod(SDTMMethod):
    """As `sdtm` between dense steps, with which plans and frequencies begin anew: every token was computed there.

    A dense step keeps one output (B, N, C) of each site that merges before the next one: in the detail phase the MLP's
    alone. It takes the place of what was kept before, and is freed when the run ends.
    """

    name = SDTMCached.called
    config_class = SDTMCached
    hint = "merging cannot touch what is computed per sample, and the first step is dense"

    def __init__(self, config: SDTMCached, description: Description) -> None:
        super().__init__(config, description)
        self.storing: tuple[str, ...] = ()  # sites that store in this step
        self.results: dict[Place, tuple[Halves, Tensor]] = {}

    def check_beside(self, others: Sequence[Method]) -> None:
        """Another method that decides about steps is refused: the dense steps must be computed."""
        for other in others:
            if other.decides_steps:
                raise DiffratioError(
                    f"sdtm_cached and {other.name} both keep outputs from step to step; take sdtm beside {other.name}"
                )

    def clock(self, step: int) -> int:
        """Steps since the one after the last dense one."""
        return step % self.config.refresh - 1

    def storing_sites(self, step: int, run: SamplingRun) -> tuple[str, ...]:
        """Sites whose outputs a step stores: a dense one those that merge before the next dense one."""
        if not self.config.refreshes(step) or self.config.blend == 0:
            return ()
        after = range(step + 1, min(step + self.config.refresh, run.steps))
        wanted = {site for later in after for site in self.merging_sites(later, run)}
        return tuple(site for site in self.sites() if site in wanted)

    def stored_numbers(self, run: SamplingRun) -> int:
        """What the fullest dense step stores."""

        def numbers(step: int) -> int:
            sites = self.storing_sites(step, run)
            return run.halves_at(step) * numbers_of_sites(self.description, self.layers, sites, run.grid.tokens)

        return max(numbers(step) for step in range(run.steps))

    def begin_run(self, run: SamplingRun) -> None:
        """Forgets the stored outputs."""
        self.results = {}

    def end_run(self) -> None:
        """Frees the stored outputs."""
        self.results = {}

    def begin_step(self, ctx: StepContext) -> None:
        """A dense step begins anew: nothing that was stored, planned or counted before it is used again."""
        super().begin_step(ctx)
        assert ctx.run is not None and ctx.step is not None
        self.storing = self.storing_sites(ctx.step, ctx.run)
        if self.config.refreshes(ctx.step):
            self.results, self.plans, self.ages = {}, {}, None

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """All tokens where outputs are stored, else as `sdtm`."""
        if not self.storing or layer not in self.layers:
            return super().plan(layer, site, x, ctx)
        if site == "block":
            self.turns = {}
            return None
        if site not in self.storing:
            return None
        turn = self.turns[site] = self.turns.get(site, -1) + 1
        keep = functools.partial(self._keep, (layer, site, turn), ctx.halves)
        return StoredPlan(all_tokens(x.shape[1], x.device), keep=keep)

    def _keep(self, place: Place, halves: Halves, result: Tensor) -> None:
        # a copy: text tokens may stand in the same memory, and would be kept with it
        self.results[place] = (halves, result.clone())

    def _at(self, place: Place, plan: MergePlan, ctx: StepContext) -> MergePlan:
        """With the module's own stored output."""
        plan = super()._at(place, plan, ctx)
        if self.config.blend == 0:
            return plan
        if place not in self.results:
            raise DiffratioError(
                f"{self.name}: {place[1]} of block {place[0]} stored nothing in this run before step {ctx.step}: begin "
                "a run at step 0, with scheduler.set_timesteps"
            )
        halves, result = self.results[place]
        stored = same_samples(self.name, of_halves(halves, result, ctx.halves), len(plan.slots))
        return BlendPlan(**vars(plan), stored=stored, blend=self.config.blend)

    @classmethod
    def ladders(cls, description: Description, run: SamplingRun) -> Iterator[Sequence[SDTM]]:
        """As `sdtm` with the published interval; then detail steps merge around attention, at longer intervals."""
        for sites in (PUBLISHED_SITES, STRUCTURE_SITES):
            yield from by_layers(SDTMCached, description, run, sites)
        longer = [refresh for refresh in _WIDER if refresh < run.steps] + [max(run.steps, _REFRESH + 1)]
        for refresh in longer:
            make = functools.partial(SDTMCached, refresh=refresh)
            yield from by_layers(make, description, run, STRUCTURE_SITES, fewer=refresh == longer[-1])
