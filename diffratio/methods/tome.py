"""`tome`: token merging for diffusion (ToMe, arXiv 2303.17604), training-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    check_layers,
    check_number,
    check_sites,
    dearest_on_ladders,
    from_middle,
    same_samples,
    whole,
)
from diffratio.tokens.matching import bipartite_merge, cell_destinations, seeded_uniform
from diffratio.tokens.plan import MergePlan, Plan


@dataclass(frozen=True)
class ToMe(MethodConfig):
    """Merges similar tokens before a module and copies the result back after it.

    Args:
        ratio: fraction of the tokens removed, 0..0.75; higher removes more.
        sites: where tokens are merged; the paper and its release merge around self-attention.
        metric: what is compared: `input`, the block's input (release), or `normed`, the site's own input.
        random: one random destination a cell, drawn anew each step; otherwise the top-left token.
        layers: blocks that merge, by index; None is all of them.
        plan_blocks: merging blocks that share one plan; higher plans less, None plans once a step. The release: 1.
        plan_every: steps that share one plan; higher plans less and needs an attached pipeline. The release: 1.
        mix: plans take turns between the two whole numbers next to ratio N, so that budgets are met finely; otherwise
            all remove floor(ratio N) tokens (release).
    """

    ratio: float = 0.0
    sites: tuple[str, ...] = ("self_attention",)
    metric: str = "input"
    random: bool = True
    layers: tuple[int, ...] | None = None
    plan_blocks: int | None = 1
    plan_every: int = 1
    mix: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        check_number(name, "ratio", self.ratio, 0, HIGHEST, f"each {CELL}x{CELL} cell keeps one token")
        check_sites(name, self.sites)
        if self.metric not in ("input", "normed"):
            raise unknown(f"{name} metric", self.metric, ("input", "normed"))
        check_count(name, "plan_every", self.plan_every, 1, "steps that share a plan")
        if self.plan_blocks is not None:
            check_count(name, "plan_blocks", self.plan_blocks, 1, "blocks that share a plan; null for all")
        if self.metric == "normed" and (self.plan_blocks, self.plan_every) != (1, 1):
            raise DiffratioError(
                f"{name}: metric 'normed' plans at every site, so plan_blocks and plan_every must be 1, "
                f"got {self.plan_blocks!r} and {self.plan_every!r}; share plans with metric 'input'"
            )

    @property
    def as_published(self) -> bool:
        """Whether only self-attention is merged."""
        return self.sites == ("self_attention",)


@register
class ToMeMethod(Method):
    """One plan a block from its input, shared by its sites (metric `input`), or one a site (metric `normed`).

    Each sample of a batch, and so each guidance half, has a matching of its own; the destinations are shared by all.
    """

    name = "tome"
    config_class = ToMe

    def __init__(self, config: ToMe, description: Description) -> None:
        super().__init__(config, description)
        self.layers = check_layers(self.name, config.layers, description)
        self.sharing = Sharing(self.layers, config.plan_blocks, config.plan_every)
        self.split: tuple[Tensor, Tensor] | None = None  # sources and destinations of this step
        self.plans: dict[int, MergePlan] = {}  # by group of blocks
        self.present: Plan | None = None  # of the block that is running
        self.carried: RunState[dict[int, MergePlan]] = RunState(self.name)

    def sites(self) -> tuple[str, ...]:
        """The configured ones."""
        return tuple(self.config.sites)

    def removed(self, layer: int, step: int, tokens: int, sources: int) -> int:
        """r = floor(ratio N), or mixed; at most the sources of this grid (odd edges have no destination of their own).

        Outside an open run every forward counts as step 0.
        """
        turn = self.sharing.turn(layer, step)
        return min(whole(self.config.ratio * tokens, turn, self.config.mix), sources)

    def begin_step(self, ctx: StepContext) -> None:
        """Draws the step's destinations: one draw for all samples and guidance halves."""
        self.plans, self.present = {}, None
        if self.config.ratio == 0:
            return
        check_cells(self.name, ctx.grid, CELL)
        if self.config.plan_every > 1:
            if ctx.step is None:
                raise DiffratioError(
                    f"{self.name}: plan_every={self.config.plan_every} keeps plans from step to step and needs an "
                    "open run: diffratio.attach_(pipe) first, or set plan_every=1"
                )
            self.carried.begin(ctx.step)
            if not self.sharing.renews(ctx.step):
                self.plans = dict(self.carried.value or {})
            self.carried.next = self.plans  # filled by this step's blocks
        draws = None
        if self.config.random:
            draws = seeded_uniform((ctx.grid.tokens,), ctx.seed, ctx.step or 0)
        self.split = cell_destinations(ctx.grid, CELL, draws)

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """Plans at the block's input, or at the site's."""
        if layer not in self.layers or self.config.ratio == 0:
            return None
        if site == "block":
            self.present = (
                self.finish(self._shared(layer, x, ctx), layer, ctx) if self.config.metric == "input" else None
            )
            return None
        return self.present if self.config.metric == "input" else self.finish(self._match(layer, x, ctx), layer, ctx)

    def finish(self, plan: MergePlan | None, layer: int, ctx: StepContext) -> Plan | None:
        """What a matching becomes in this block: here the mean of each group."""
        return plan

    def _shared(self, layer: int, x: Tensor, ctx: StepContext) -> MergePlan | None:
        group = self.sharing.group(layer)
        if group not in self.plans:
            plan = self._match(layer, x, ctx)
            if plan is None:
                return None
            self.plans[group] = plan.prepared()
        plan = self.plans[group]
        same_samples(self.name, plan.slots, len(x))
        return plan

    def _match(self, layer: int, x: Tensor, ctx: StepContext) -> MergePlan | None:
        assert self.split is not None
        sources, destinations = self.split = (self.split[0].to(x.device), self.split[1].to(x.device))
        removed = self.removed(layer, ctx.step or 0, x.shape[1], len(sources))
        return bipartite_merge(x, sources, destinations, removed) if removed else None

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """k tokens at the merged sites; matching N_src N_dst d a plan."""
        if layer not in self.layers or self.config.ratio == 0:
            return BlockUse()
        tokens = run.grid.tokens
        destinations = check_cells(self.name, run.grid, CELL)
        removed = self.removed(layer, step, tokens, tokens - destinations)
        if removed == 0:
            return BlockUse()
        here = [site.name for site in self.description.blocks[layer].sites if site.name in self.config.sites]
        plans = len(here)
        if self.config.metric == "input":
            plans = int(self.sharing.leads(layer) and self.sharing.renews(step))
        matching = plans * (tokens - destinations) * destinations * self.description.width
        return BlockUse({site: (tokens - removed,) * 2 for site in here}, planning=matching)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> Any:
        """Raises the ratio on self-attention; where that is not enough, feed_forward and cross_attention join.

        Blocks and steps mix two neighbouring counts. Where even one token costs more in matching than it saves, fewer
        blocks merge more: the middle ones first.
        """
        budget = check_budget(budget)
        if budget == 1:
            return cls.config_class()
        check_cells(cls.name, run.grid, CELL)
        hint = "merging cannot touch what is computed per sample"
        return dearest_on_ladders(cls, cls._ladders(description, run), description, run, budget, hint)

    @classmethod
    def _ladders(cls, description: Description, run: SamplingRun) -> Iterator[Sequence[Any]]:
        make: Any = cls.config_class
        available = {site.name for block in description.blocks for site in block.sites}
        tokens, inner = run.grid.tokens, from_middle(description.layers)
        rungs = int(HIGHEST * tokens) * description.layers

        widenings = (("self_attention",), ("self_attention", "feed_forward"), SITES)
        for sites in dict.fromkeys(tuple(site for site in one if site in available) for one in widenings):
            yield Ladder(
                rungs,
                lambda at, sites=sites: make(HIGHEST * (at + 1) / rungs, sites, mix=True),  # type: ignore[misc]
            )
            for count in range(description.layers - 1, 0, -1):
                yield Ladder(
                    rungs,
                    lambda at, sites=sites, count=count: make(  # type: ignore[misc]
                        HIGHEST * (at + 1) / rungs, sites, layers=tuple(sorted(inner[:count])), mix=True
                    ),
                )
