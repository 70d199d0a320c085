"""`importance`: importance-based token merging (arXiv 2411.16720, ICCV 2025), training-free; needs guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.cost.macs import BlockUse, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.base import Method, MethodConfig, check_budget, register
from diffratio.methods.merging import (
    CELL,
    HIGHEST,
    SITES,
    Ladder,
    RunState,
    Sharing,
    check_cells,
    check_count,
    check_number,
    check_sites,
    dearest_on_ladders,
    from_middle,
    same_samples,
    whole,
)
from diffratio.methods.predictions import token_distance
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import (
    cell_destinations,
    complement,
    foremost,
    merge_into,
    nearest_partners,
    seeded_uniform,
    similar_partners,
)
from diffratio.tokens.plan import MergePlan, Plan

MATCHINGS = ("distance", "cosine")


@dataclass(frozen=True)
class Published:
    """The settings of one published variant; see `Importance` for what they mean."""

    ratio: float
    pool: float
    matching: str
    sites: tuple[str, ...]
    blocks: float
    drop_steps: int


VARIANTS = {
    "pixart": Published(0.5, 1.0, "distance", ("self_attention", "cross_attention"), 0.5, 4),
    "sd": Published(0.7, 1.4, "cosine", ("self_attention",), 1.0, 2),
}


@dataclass(frozen=True)
class Importance(MethodConfig):
    """Merges where guidance changes little, and keeps the tokens on which the two halves disagree.

    What is None is taken from the variant.

    Args:
        variant: `pixart` or `sd`: the published settings that fill what is None.
        ratio: fraction of the tokens removed, 0..0.75; higher removes more. pixart 0.5, sd 0.7.
        pool: p: the floor((N - r) p) most important tokens are protected, from which destinations are drawn. 1 removes
            exactly the other tokens; higher lets matching decide more. From 1. pixart 1, sd 1.4.
        matching: a token's destination: `distance`, the nearest on the grid, one plan for all blocks and both
            guidance halves (pixart), or `cosine`, the most similar, a plan for each half (sd).
        sites: where tokens are merged. pixart self- and cross-attention (where there is one), sd self-attention.
        blocks: fraction of the blocks, around the middle, that merge, 0..1; higher merges in more. pixart 0.5, sd 1.
        drop_steps: so many first steps compute destinations alone instead of means. pixart 4 (of 20), sd 2.
        plan_blocks: merging blocks that share a cosine plan; None plans once a step. The release: 1.
        mix: steps take turns between the two whole numbers next to ratio N, so that budgets are met finely; otherwise
            all remove floor(ratio N) tokens.
    """

    variant: str = "pixart"
    ratio: float | None = None
    pool: float | None = None
    matching: str | None = None
    sites: tuple[str, ...] | None = None
    blocks: float | None = None
    drop_steps: int | None = None
    plan_blocks: int | None = 1
    mix: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("importance variant", self.variant, VARIANTS)
        full = self.resolved
        check_number("importance", "ratio", full.ratio, 0, HIGHEST, "a quarter of the tokens are destinations")
        check_number("importance", "pool", full.pool, 1, 4, "below 1 more tokens lie outside than are merged")
        if full.matching not in MATCHINGS:
            raise unknown("importance matching", full.matching, MATCHINGS)
        check_sites("importance", full.sites)
        check_number("importance", "blocks", full.blocks, 0, 1, "it is a fraction of the blocks")
        check_count("importance", "drop_steps", full.drop_steps, 0, "first steps that drop")
        if self.plan_blocks is not None:
            check_count("importance", "plan_blocks", self.plan_blocks, 1, "blocks that share a plan; null for all")

    @property
    def resolved(self) -> Published:
        """Every setting, with the variant's where none is given."""
        published = VARIANTS[self.variant]

        def value(name: str) -> object:
            own = getattr(self, name)
            return getattr(published, name) if own is None else own

        return Published(**{name: value(name) for name in Published.__dataclass_fields__})  # type: ignore[arg-type]

    @property
    def as_published(self) -> bool:
        """Whether no site and no block joined beyond the variant's."""
        published, own = VARIANTS[self.variant], self.resolved
        return set(own.sites) <= set(published.sites) and own.blocks <= published.blocks


@register
class ImportanceMethod(Method):
    """Importance of a token: mean over channels and pixels of |conditional - unconditional| in the previous step.

    The first step has no previous one: it matches as ToMe does, one random destination in each 2x2 cell.
    """

    name = "importance"
    config_class = Importance
    stateful = True

    def __init__(self, config: Importance, description: Description) -> None:
        super().__init__(config, description)
        self.settings = config.resolved
        inner = from_middle(description.layers)[: round(self.settings.blocks * description.layers)]
        self.layers = tuple(sorted(inner))
        # what depends on the grid alone serves all blocks
        shared = self.settings.matching == "distance"
        self.sharing = Sharing(self.layers, None if shared else config.plan_blocks)
        self.plans: dict[int, MergePlan] = {}
        self.present: Plan | None = None
        self.carried: RunState[Tensor] = RunState(self.name)  # importance (samples, N)
        self.split: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.draws = torch.empty(0)

    def sites(self) -> tuple[str, ...]:
        """The given ones; of the variant's own those that the model has."""
        if self.config.sites is not None:
            return self.settings.sites
        present = {site.name for block in self.description.blocks for site in block.sites}
        return tuple(site for site in self.settings.sites if site in present)

    def removed(self, grid: TokenGrid, step: int) -> int:
        """r = floor(ratio N), or mixed; at most what is left beside floor(N / 4) destinations."""
        return min(whole(self.settings.ratio * grid.tokens, step, self.config.mix), grid.tokens - _destinations(grid))

    def begin_step(self, ctx: StepContext) -> None:
        """Draws for the destinations; takes over the importance that the previous step left."""
        self.plans, self.present, self.split = {}, None, None
        if self.settings.ratio == 0:
            return
        if not ctx.paired:
            raise _unguided()
        check_cells(self.name, ctx.grid, CELL)
        assert ctx.step is not None
        self.carried.begin(ctx.step)
        self.draws = seeded_uniform((ctx.grid.tokens,), ctx.seed, ctx.step)

    def end_step(self, output: Tensor, ctx: StepContext) -> None:
        """Measures on which tokens the halves of the prediction (2n, C, H, W) disagree, (n, N)."""
        if self.settings.ratio == 0:
            return
        first, second = output.detach().float().chunk(2)  # in either order
        self.carried.next = token_distance(self.name, self.description, first, second, ctx.grid)

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """Plans at the first block of a group; one split into sources and destinations a step and sample."""
        if layer not in self.layers or not self.removed(ctx.grid, ctx.step or 0):
            return None
        if site == "block":
            group = self.sharing.group(layer)
            if group not in self.plans:
                self.plans[group] = self._made(x, ctx).prepared()
            plan = self.plans[group]
            assert ctx.step is not None
            self.present = plan.dropped() if ctx.step < self.settings.drop_steps else plan
            return None
        return self.present

    def _made(self, x: Tensor, ctx: StepContext) -> MergePlan:
        if self.split is None:
            self.split = self._divided(ctx, len(x) // 2, x.device)
        sources, destinations, first = self.split
        assert ctx.step is not None
        removed = self.removed(ctx.grid, ctx.step)
        if self.settings.matching == "distance":
            best, partner = nearest_partners(ctx.grid, sources, destinations)
        else:
            sources, destinations = sources.repeat(2, 1), destinations.repeat(2, 1)
            first = None if first is None else first.repeat(2, 1)
            best, partner = similar_partners(x, sources, destinations)
        merged = foremost(best, removed, first)
        targets = destinations.gather(1, partner.gather(1, merged))
        plan = merge_into(ctx.grid.tokens, sources.gather(1, merged), targets)
        return plan if len(plan.slots) == len(x) else plan.repeated(2)

    def _divided(self, ctx: StepContext, samples: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sources and destinations (samples, n), and which of the sources merge before all others."""
        grid = ctx.grid
        if self.carried.value is None:
            plain, corners = cell_destinations(grid, CELL, self.draws)
            return plain.to(device).repeat(samples, 1), corners.to(device).repeat(samples, 1), None
        importance, removed = same_samples(self.name, self.carried.value, samples), self.removed(grid, ctx.step or 0)
        protected = min(grid.tokens, int((grid.tokens - removed) * self.settings.pool + 1e-9))
        inside = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, foremost(importance, protected), True)
        order = self.draws.to(device).expand_as(importance).masked_fill(~inside, torch.inf)
        destinations = foremost(-order, _destinations(grid)).sort(dim=1).values
        sources = complement(destinations, grid.tokens)
        return sources, destinations, ~inside.gather(1, sources)

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """k tokens at the merged sites; matching N_src N_dst d by cosine, 2 N_src N_dst a sample by distance."""
        removed = self.removed(run.grid, step)
        if removed == 0 or layer not in self.layers:
            return BlockUse()
        if run.guidance == "none":
            raise _unguided()
        tokens, wanted = run.grid.tokens, self.sites()
        here = [site.name for site in self.description.blocks[layer].sites if site.name in wanted]
        planning = 0
        if self.sharing.leads(layer):
            count = check_cells(self.name, run.grid, CELL) if step == 0 else _destinations(run.grid)
            pairs = (tokens - count) * count
            planning = pairs * self.description.width if self.settings.matching == "cosine" else 2 * pairs // run.halves
        return BlockUse({site: (tokens - removed,) * 2 for site in here}, planning=planning)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> Importance:
        """Raises the ratio of variant `pixart`; then three quarters of the blocks, then all, then feed_forward joins.

        Steps mix two neighbouring counts. Where that leaves a gap, fewer blocks merge more: the middle ones first.
        """
        budget = check_budget(budget)
        if budget == 1:
            return Importance(ratio=0.0)
        if run.guidance == "none":
            raise _unguided()
        check_cells(cls.name, run.grid, CELL)
        hint = "merging cannot touch what is computed per sample"
        config = dearest_on_ladders(cls, _ladders(description, run), description, run, budget, hint)
        assert isinstance(config, Importance)
        return config


def _ladders(description: Description, run: SamplingRun) -> Iterator[Sequence[Importance]]:
    available = {site.name for block in description.blocks for site in block.sites}
    everywhere = tuple(site for site in SITES if site in available)
    rungs = run.grid.tokens * run.steps

    def ladder(blocks: float | None, sites: tuple[str, ...] | None) -> Ladder[Importance]:
        return Ladder(
            rungs, lambda at: Importance(ratio=HIGHEST * (at + 1) / rungs, blocks=blocks, sites=sites, mix=True)
        )

    widenings: tuple[tuple[float | None, tuple[str, ...] | None], ...]
    widenings = ((None, None), (0.75, None), (1.0, None), (1.0, everywhere))
    for blocks, sites in widenings:
        yield ladder(blocks, sites)
        share = VARIANTS["pixart"].blocks if blocks is None else blocks
        for count in range(round(share * description.layers) - 1, 0, -1):
            yield ladder(count / description.layers, sites)


def _destinations(grid: TokenGrid) -> int:
    return grid.tokens // 4


def _unguided() -> DiffratioError:
    return DiffratioError(
        "importance compares the two guidance halves, so both must be in one batch: sample with guidance "
        "(guidance_scale above 1), or choose a method without it such as tome"
    )
