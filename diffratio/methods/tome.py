"""`tome`: token merging for diffusion (ToMe, arXiv 2303.17604), training-free."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffratio.cost.macs import BlockUse, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import BudgetUnreachable, DiffratioError, unknown
from diffratio.methods.base import Method, MethodConfig, check_budget, dearest_within, register
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import bipartite_merge, cell_destinations, seeded_uniform
from diffratio.tokens.plan import MergePlan, Plan

CELL = 2
HIGHEST = 1 - 1 / CELL**2
SITES = ("self_attention", "cross_attention", "feed_forward")


@dataclass(frozen=True)
class ToMe(MethodConfig):
    """Merges similar tokens before a module and copies the result back after it.

    Args:
        ratio: fraction of the tokens removed, 0..0.75; higher removes more.
        sites: where tokens are merged; the paper and its release merge around self-attention.
        metric: what is compared: `input`, the block's input (release), or `normed`, the site's own input.
        random: one random destination a cell, drawn anew each step; otherwise the top-left token.
        layers: blocks that merge, by index; None is all of them.
    """

    ratio: float = 0.0
    sites: tuple[str, ...] = ("self_attention",)
    metric: str = "input"
    random: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= HIGHEST:
            raise DiffratioError(
                f"tome: ratio {self.ratio!r} is outside [0, {HIGHEST}]: each {CELL}x{CELL} cell keeps one token"
            )
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise DiffratioError(f"tome: sites {self.sites!r} must name one or more of {', '.join(SITES)}, each once")
        for site in self.sites:
            if site not in SITES:
                raise unknown("tome site", site, SITES)
        if self.metric not in ("input", "normed"):
            raise unknown("tome metric", self.metric, ("input", "normed"))

    @property
    def as_published(self) -> bool:
        """Whether only self-attention is merged."""
        return self.sites == ("self_attention",)


@register
class ToMeMethod(Method):
    """One plan a block from its input, shared by its sites (metric `input`), or one a site (metric `normed`)."""

    name = "tome"
    config_class = ToMe

    def __init__(self, config: ToMe, description: Description) -> None:
        super().__init__(config, description)
        self.split: tuple[Tensor, Tensor] | None = None
        self.present: Plan | None = None
        layers = range(description.layers) if config.layers is None else config.layers
        if any(layer not in range(description.layers) for layer in layers):
            raise DiffratioError(f"tome: layers {config.layers} do not fit a model of {description.layers} blocks")
        self.layers = frozenset(layers)

    def sites(self) -> tuple[str, ...]:
        """The configured ones."""
        return tuple(self.config.sites)

    def removed(self, tokens: int, sources: int) -> int:
        """r = floor(ratio N), at most the sources of this grid; a grid smaller than a cell has nowhere to merge to."""
        return min(int(self.config.ratio * tokens), sources) if sources < tokens else 0

    def begin_step(self, ctx: StepContext) -> None:
        """Draws the step's destinations: one draw for all samples and guidance halves."""
        draws = None
        if self.config.random:
            draws = seeded_uniform((ctx.grid.tokens,), ctx.seed, ctx.step or 0)
        self.split = cell_destinations(ctx.grid, CELL, draws)

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """Plans at the block's input, or at the site's."""
        assert self.split is not None
        sources, destinations = self.split
        removed = self.removed(x.shape[1], len(sources))
        if removed == 0 or layer not in self.layers:
            return None
        if site == "block":
            self.present = self._match(x, removed) if self.config.metric == "input" else None
            return None
        return self.present if self.config.metric == "input" else self._match(x, removed)

    def _match(self, x: Tensor, removed: int) -> MergePlan:
        assert self.split is not None
        return bipartite_merge(x, *self.split, removed)

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """k tokens at the merged sites; matching N_src N_dst d a plan."""
        grid = run.grid
        sources, destinations = _counts(grid)
        removed = self.removed(grid.tokens, sources)
        if removed == 0 or layer not in self.layers:
            return BlockUse()
        here = [site.name for site in self.description.blocks[layer].sites if site.name in self.config.sites]
        kept = grid.tokens - removed
        plans = 1 if self.config.metric == "input" else len(here)
        matching = plans * sources * destinations * self.description.width
        return BlockUse({site: (kept, kept) for site in here}, planning=matching)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> ToMe:
        """Raises the ratio on self-attention; where that is not enough, feed_forward and cross_attention join.

        Below the finest reachable step of the ratio (one token in one block) blocks mix: the middle ones merge first.
        """
        budget = check_budget(budget)
        available = {site.name for block in description.blocks for site in block.sites}
        widenings = [
            tuple(site for site in sites if site in available)
            for sites in (("self_attention",), ("self_attention", "feed_forward"), SITES)
        ]
        tokens, lowest, highest = run.grid.tokens, 1.0, 1.0
        from_middle = sorted(range(description.layers), key=lambda i: (abs(i - (description.layers - 1) / 2), i))
        if budget == 1:
            return ToMe()
        for sites in dict.fromkeys(widenings):
            removals = range(1, int(HIGHEST * tokens) + 1)
            full = [ToMe(min(HIGHEST, removed / tokens + 1e-9), sites) for removed in removals]
            cheapest = cls(full[-1], description).macs(run).fraction
            lowest = min(lowest, cheapest)
            if cheapest > budget:
                continue
            partial = [
                ToMe(full[at].ratio, sites, layers=tuple(sorted(from_middle[:count])))
                for at in (len(full) // 3, len(full) * 2 // 3, len(full) - 1)
                for count in range(1, description.layers)
            ]
            for candidates in (full, partial):
                try:
                    return dearest_within(cls, candidates, description, run, budget)
                except BudgetUnreachable as error:
                    lowest, highest = min(lowest, error.reachable[0]), max(highest, error.reachable[1])
        raise BudgetUnreachable(cls.name, budget, (lowest, highest), "merging cannot touch what is computed per sample")


def _counts(grid: TokenGrid) -> tuple[int, int]:
    destinations = (grid.height // CELL) * (grid.width // CELL)
    return grid.tokens - destinations, destinations
