"""`diffcr`: learned routers and differentiable keep ratios, per layer and region (arXiv 2412.16822)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffratio.cost.macs import CostTable, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import BudgetUnreachable, DiffratioError, unknown
from diffratio.methods.base import BlockCall, check_budget, register
from diffratio.methods.estimators import Pair, exact, in_groups, one_sample, soft
from diffratio.methods.routed import RoutedConfig, RoutedMethod
from diffratio.methods.streams import Result, joined
from diffratio.routing.ratios import Bracket, KeepRatios, bracket
from diffratio.routing.router import ranking
from diffratio.routing.schedule import KeepSchedule, Table, constant_table, round_to_budget

ESTIMATORS = ("grouped", "soft", "loop")


@dataclass(frozen=True)
class DiffCR(RoutedConfig):
    """Learns its schedule; with no arguments nothing is routed yet.

    Args:
        regions: noise-level regions R; 1 learns one ratio a layer. A schedule brings its own.
        estimator: how a batch is run while ratios are learned. `grouped`: samples with the same two bins run together,
            exact. `soft`: one pass at the upper bin, whose extra tokens count by the weight; equal on the bins,
            approximate between them, about half of the cost. `loop`: one sample at a time, the oracle of the tests.
        start: a schedule at whose bins the ratios start, instead of at 1 everywhere; it brings its own regions. From
            there they are learned, where `schedule` fixes them.
    """

    regions: int = 4
    estimator: str = "grouped"
    start: KeepSchedule | None = None

    def __post_init__(self) -> None:
        if type(self.regions) is not int or not 1 <= self.regions <= 1000:
            raise DiffratioError(f"diffcr: regions {self.regions!r} must be an integer in 1..1000")
        if self.estimator not in ESTIMATORS:
            raise unknown("diffcr estimator", self.estimator, ESTIMATORS)
        if self.schedule is not None and self.start is not None:
            raise DiffratioError(
                "diffcr: schedule fixes the keep ratios and start learns on from one; give one of them"
            )

    def preset(self, layers: int) -> Table:
        """Ten everywhere: the dense model."""
        return constant_table(layers, self.regions)


@register
class DiffCRMethod(RoutedMethod):
    """Between two bins a < rho <= b a block gives (1 - w) Block(x; a) + w Block(x; b), w = (rho - a) / (b - a).

    While `ratios` is present and training is on, blocks interpolate and the ratios get gradient; in evaluation, and
    after `freeze_`, the integer table is used. Set `interpolate_in_eval` to measure the loss before rounding.
    """

    name = "diffcr"
    config_class = DiffCR

    def __init__(self, config: DiffCR, description: Description) -> None:
        super().__init__(config, description)
        self.ratios = None if config.schedule else self._first_ratios(config, description.layers)
        learning = self.ratios is not None
        self.indexes_attention = learning and config.estimator == "soft"  # its boundary keys carry a bias
        self.nests_attention = learning and config.estimator == "grouped"
        self.interpolate_in_eval = False
        self.interpolating = False
        self.brackets: list[list[Bracket]] = []

    def _first_ratios(self, config: DiffCR, layers: int) -> KeepRatios:
        if config.start is None:
            return KeepRatios(layers, config.regions)
        self.bins = RoutedConfig(config.start).table(layers)
        return KeepRatios.at(self.bins)

    def root_modules(self) -> dict[str, nn.Module]:
        """The ratios, until they are frozen."""
        return {} if self.ratios is None else {"keep_ratios": self.ratios}

    def freeze_(self, schedule: KeepSchedule) -> None:
        """From now on the schedule is fixed: the ratios are gone, routers and weights can go on learning."""
        self.config = replace(self.config, schedule=schedule, start=None)
        self.bins, self.alignment, self.ratios = self.config.table(self.description.layers), schedule.alignment, None
        self.interpolating = False

    def round_(self, costs: CostTable, budget: float, harm: list[list[float]] | None = None) -> Table:
        """Sets the integer table that evaluation uses to the present ratios rounded into the budget; returns it."""
        assert self.ratios is not None
        self.bins = round_to_budget(self.ratios.table(), costs, budget, harm)
        return self.bins

    def begin_step(self, ctx: StepContext) -> None:
        """Reads the ratios once a forward."""
        super().begin_step(ctx)
        self.interpolating = self.ratios is not None and (ctx.training or self.interpolate_in_eval)
        if self.interpolating:
            assert self.ratios is not None
            self.brackets = [[bracket(ratio) for ratio in row] for row in self.ratios.table()]

    def run_block(self, layer: int, call: BlockCall, ctx: StepContext) -> Result:
        """Interpolated while the ratios are learned, by the table otherwise."""
        if not self.interpolating or self.ratios is None:
            return super().run_block(layer, call, ctx)
        (batch, tokens, _), row = call.x.shape, self.brackets[layer]
        each = self.regions.each if self.regions.shared is None else (self.regions.shared,) * batch
        regions = torch.tensor(each, device=call.x.device)
        weights = self.ratios.weight(layer, regions, row)  # (B,)
        pairs = [self._pair(row[region], tokens, weights.requires_grad) for region in each]
        logits = self.logits(layer, call.x)
        if self.config.estimator == "soft":
            return in_groups(call, logits, pairs, weights, soft, twice=False)
        if self.config.estimator == "grouped":
            return in_groups(call, logits, pairs, weights, exact, twice=True)
        samples = torch.arange(batch, device=weights.device).split(1)
        parts = zip(samples, logits.split(1), pairs, weights.split(1), strict=True)
        return joined([self._alone(layer, call.select(one), *rest) for one, *rest in parts])

    def _alone(self, layer: int, call: BlockCall, logits: Tensor, pair: Pair, weight: Tensor) -> Result:
        """A batch of one, a bin at a time."""
        ranked = ranking(logits)
        return one_sample(pair, weight, lambda kept: self.run_best(layer, call, logits, ranked, kept))

    def _pair(self, at: Bracket, tokens: int, learning: bool) -> Pair:
        """The derivative in a ratio needs both bins even where its value is one of them."""
        return Pair(self.keep(at.lower, tokens), self.keep(at.upper, tokens), at.weight == 1.0 and not learning)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> DiffCR:
        """Only 1: a learned schedule comes from training.

        Raises:
            BudgetUnreachable: any other budget.
        """
        if check_budget(budget) < 1:
            hint = "its ratios are learned: train with budget.target, or give a schedule or a routed checkpoint"
            raise BudgetUnreachable(cls.name, budget, (1.0, 1.0), hint)
        return DiffCR()
