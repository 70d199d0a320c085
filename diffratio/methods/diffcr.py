"""`diffcr`: learned routers and differentiable keep ratios, per layer and region (arXiv 2412.16822)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffratio.cost.macs import CostTable, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import BudgetUnreachable, DiffratioError, unknown
from diffratio.methods.base import BlockCall, check_budget, register
from diffratio.methods.routed import RoutedConfig, RoutedMethod, grouped
from diffratio.routing.ratios import Bracket, KeepRatios, bracket
from diffratio.routing.router import ranking
from diffratio.routing.schedule import KeepSchedule, Table, constant_table, round_to_budget

ESTIMATORS = ("grouped", "loop")


@dataclass(frozen=True)
class DiffCR(RoutedConfig):
    """Learns its schedule; with no arguments nothing is routed yet.

    Args:
        regions: noise-level regions R; 1 learns one ratio a layer. A schedule brings its own.
        estimator: how a batch is run while ratios are learned. `grouped`: samples with the same two bins run together,
            exact. `loop`: one sample at a time, the oracle of the tests.
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

    def run_block(self, layer: int, call: BlockCall, ctx: StepContext) -> Tensor:
        """Interpolated while the ratios are learned, by the table otherwise."""
        if not self.interpolating or self.ratios is None:
            return super().run_block(layer, call, ctx)
        batch, row = call.x.shape[0], self.brackets[layer]
        each = self.regions.each if self.regions.shared is None else (self.regions.shared,) * batch
        regions = torch.tensor(each, device=call.x.device)
        weights = self.ratios.weight(layer, regions, row)  # (B,)
        return _ESTIMATORS[self.config.estimator](self, layer, call, [row[region] for region in each], weights)

    def interpolated(self, layer: int, call: BlockCall, at: Bracket, weight: Tensor) -> Tensor:
        """Both passes for samples of one bracket, whose weights (b,) may differ by region.

        The derivative in the ratio needs the second pass even where the value does not, so it is skipped only where
        nothing learns and the weights sit on a bin.
        """
        tokens = call.x.shape[1]
        logits = self.routers[layer](call.x)
        ranked = ranking(logits)
        low, high = self.keep(at.lower, tokens), self.keep(at.upper, tokens)
        upper = self.run_best(layer, call, logits, ranked, high)
        if not weight.requires_grad and (low == high or at.weight == 1.0):
            return upper
        # equal numbers of tokens: neutral, but the ratios stay in the graph, as DDP needs
        lower = upper if low == high else self.run_best(layer, call, logits, ranked, low)
        dtype = torch.promote_types(lower.dtype, upper.dtype)
        return torch.lerp(lower.to(dtype), upper.to(dtype), weight[:, None, None].to(dtype))

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


def _grouped(method: DiffCRMethod, layer: int, call: BlockCall, at: list[Bracket], weights: Tensor) -> Tensor:
    """Samples of equal bins (whatever their weights) run together."""
    keys = [(bracket_.lower, bracket_.upper, bracket_.weight == 1.0) for bracket_ in at]
    where: dict[tuple[int, int, bool], list[int]] = {}
    for sample, key in enumerate(keys):
        where.setdefault(key, []).append(sample)

    def run(part: BlockCall, key: tuple[int, int, bool]) -> Tensor:
        members = torch.tensor(where[key], device=weights.device)
        return method.interpolated(layer, part, at[where[key][0]], weights[members])

    return grouped(call, keys, run)


def _loop(method: DiffCRMethod, layer: int, call: BlockCall, at: list[Bracket], weights: Tensor) -> Tensor:
    """One sample at a time: slow, and too simple to be wrong."""
    samples = torch.arange(len(at), device=weights.device)
    return torch.cat(
        [method.interpolated(layer, call.select(samples[i : i + 1]), at[i], weights[i : i + 1]) for i in range(len(at))]
    )


_ESTIMATORS: dict[str, Callable[[DiffCRMethod, int, BlockCall, list[Bracket], Tensor], Tensor]] = {
    "grouped": _grouped,
    "loop": _loop,
}
