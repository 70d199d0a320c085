"""`lite_uncond`: only the unconditional guidance half is compressed; a control."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.cost.macs import BlockUse, Description, tokens_of_bin
from diffratio.cost.run import SamplingRun, StepContext, region_of
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import BlockCall, Method, check_budget, check_guidance, register
from diffratio.methods.mod import spread
from diffratio.methods.routed import RoutedConfig
from diffratio.methods.streams import Result, joined
from diffratio.routing.schedule import SLACK, KeepSchedule, Table
from diffratio.tokens.matching import seeded_uniform
from diffratio.tokens.plan import KeepPlan


@dataclass(frozen=True)
class LiteUncond(RoutedConfig):
    """Keeps fewer tokens in the unconditional half alone.

    The guided error is s e_c - (s - 1) e_u at guidance scale s, so the unconditional half is the cheaper place to save.

    Args:
        schedule: bins of the unconditional half, solved for a budget; None takes `keep`.
        keep: mean keep ratio of the unconditional half; lower keeps fewer tokens. Between two bins, blocks of both are
            spread evenly.
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DiffratioError(
                f"lite_uncond: keep {self.keep!r} is outside (0, 1]; it is the fraction of tokens kept"
            )

    def preset(self, layers: int) -> Table:
        """Two neighbouring bins, spread evenly over the blocks."""
        return spread(layers, 1, max(layers, round(10 * self.keep * layers)))


@register
class LiteUncondMethod(Method):
    """Random tokens pass the block among themselves, the others leave it unchanged.

    "Only the unconditional half is compressed, one bin" leaves open which tokens are kept. Our reading: random ones,
    as `random_keep` does. One draw a step, (N,), from (seed, step) alone, ranks the tokens for all blocks and samples;
    a bin keeps its first k, so that a smaller bin's tokens are among a larger one's.
    """

    name = "lite_uncond"
    config_class = LiteUncond
    needs_guidance = True

    def __init__(self, config: LiteUncond, description: Description) -> None:
        super().__init__(config, description)
        self.bins: Table = config.table(description.layers)
        self.alignment = config.schedule.alignment if config.schedule else 1
        self.region = 0
        self.order = torch.empty(0, dtype=torch.long)
        self.plans: dict[int, KeepPlan] = {}

    def begin_step(self, ctx: StepContext) -> None:
        """Draws the step's order of tokens."""
        regions = len(self.bins[0])
        if ctx.noise_level is not None:
            self.region = region_of(ctx.noise_level, regions)
        elif ctx.noise_levels is not None and regions > 1 and not ctx.training:
            levels = ctx.noise_levels.tolist()
            if any(level != levels[0] for level in levels):
                raise DiffratioError(
                    "lite_uncond: samples at several noise levels in one forward; its schedule is for sampling, where "
                    "they share one"
                )
            self.region = region_of(levels[0], regions)
        else:
            self.region = 0
        self.order = seeded_uniform((ctx.grid.tokens,), ctx.seed, ctx.step or 0).argsort(descending=True)
        self.plans = {}

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> KeepPlan | None:
        """The unconditional half's plan for a block; one index for the batch."""
        kept = self.kept(layer, self.region, x.shape[1])
        if kept == x.shape[1]:
            return None
        if kept not in self.plans:
            self.plans[kept] = KeepPlan(self.order[:kept].sort().values[None].to(x.device))
        return self.plans[kept]

    def kept(self, layer: int, region: int, tokens: int) -> int:
        """Tokens of the unconditional half that a block computes."""
        return tokens_of_bin(self.bins[layer][region], tokens, self.alignment)

    def run_block(self, layer: int, call: BlockCall, ctx: StepContext) -> Result:
        """The conditional half in full, the unconditional one on its plan."""
        plan = None if ctx.halves in ("one", "cond") else self.plan(layer, "block", call.x, ctx)
        if plan is None:
            return call()
        if ctx.halves == "uncond":
            return self._reduced(call, plan)
        first, second = torch.arange(call.x.shape[0], device=call.x.device).chunk(2)
        if ctx.halves == "cond_first":
            return joined([call.select(first)(), self._reduced(call.select(second), plan)])
        return joined([self._reduced(call.select(first), plan), call.select(second)()])

    def _reduced(self, call: BlockCall, plan: KeepPlan) -> Result:
        return call.entering if plan.kept == 0 else call.on(plan)

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """Everything in the conditional half, k tokens in the other."""
        tokens = run.grid.tokens
        kept = self.kept(layer, region_of(run.noise_levels[step], len(self.bins[0])), tokens)
        if kept == tokens:
            return BlockUse()
        counts = {site.name: (kept, kept) for site in self.description.blocks[layer].sites}
        return BlockUse(unconditional=BlockUse(bypassed=True) if kept == 0 else BlockUse(counts))

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> LiteUncond:
        """Lowers one cell by one bin at a time, evenly spread; regions join only where blocks alone are too coarse."""
        check_guidance(cls, run)
        budget, layers = check_budget(budget), description.layers
        for regions in (1, 4, 20):
            cells = layers * regions
            totals = range(10 * cells, cells - 1, -1)

            def fraction(total: int, regions: int = regions) -> float:
                config = LiteUncond(KeepSchedule(spread(layers, regions, total), run, budget))
                return cls(config, description).macs(run).fraction

            at = bisect.bisect_left(totals, -budget - 1e-12, key=lambda total: -fraction(total))
            if at < len(totals) and fraction(totals[at]) >= budget - SLACK:
                table = spread(layers, regions, totals[at])
                return LiteUncond(KeepSchedule(table, run, budget), totals[at] / (10 * cells))
            lowest = fraction(totals[-1])
        hint = "the conditional half is always computed in full"
        raise BudgetUnreachable(cls.name, budget, (lowest, 1.0), hint)
