"""`hand`: a schedule by three numbers, what a person would write after reading the papers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffratio.cost.macs import CostTable, Description, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.methods.base import check_budget, register
from diffratio.methods.routed import RoutedConfig, RoutedMethod
from diffratio.routing.schedule import KeepSchedule, Table, constant_table, finer_within, moved

REGIONS = 4


@dataclass(frozen=True)
class Hand(RoutedConfig):
    """Fewer tokens in the middle blocks at noisy levels, all of them elsewhere.

    Args:
        blocks: fraction of the blocks, around the middle, that are thinned.
        levels: fraction of the noise levels, noisiest first, at which they are.
        keep: keep ratio there; lower keeps fewer tokens.
    """

    blocks: float = 0.5
    levels: float = 0.5
    keep: float = 1.0

    def __post_init__(self) -> None:
        for name in ("blocks", "levels", "keep"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise DiffratioError(f"hand: {name} {value!r} is outside (0, 1]")

    @property
    def as_published(self) -> bool:
        """Whether the default half of blocks and levels was enough."""
        return (self.blocks, self.levels) == (0.5, 0.5)

    def preset(self, layers: int) -> Table:
        """The rule's table at its keep ratio, rounded to a bin."""
        table = constant_table(layers, REGIONS)
        for cell in self.cells(layers):
            table = moved(table, cell, max(1, round(10 * self.keep)) - 10)
        return table

    def cells(self, layers: int) -> list[tuple[int, int]]:
        """The thinned cells, from the middle outwards and from noisy to clean."""
        from_middle = sorted(range(layers), key=lambda layer: (abs(layer - (layers - 1) / 2), layer))
        chosen = from_middle[: max(1, round(self.blocks * layers))]
        noisy = range(REGIONS - 1, REGIONS - 1 - max(1, round(self.levels * REGIONS)), -1)
        return [(layer, region) for region in noisy for layer in chosen]


@register
class HandMethod(RoutedMethod):
    """Routing by rule."""

    name = "hand"
    config_class = Hand
    takes_costs = True

    @classmethod
    def for_budget(
        cls, description: Description, run: SamplingRun, budget: float, *, costs: CostTable | None = None
    ) -> Hand:
        """Lowers the chosen cells bin by bin; half the blocks and levels first, then three quarters, then all.

        Args:
            description: the transformer.
            run: the run whose steps the budget counts.
            budget: fraction of the dense run; lower keeps fewer tokens.
            costs: cost table of that run, for a budget in its unit; None counts MACs.

        Raises:
            BudgetUnreachable: below what the lowest bin in every cell costs.
        """
        budget = check_budget(budget)
        costs = costs or macs_table(description, run)
        for fraction in (0.5, 0.75, 1.0):
            rule = Hand(blocks=fraction, levels=fraction)
            path = list(_path(rule, description.layers, costs.levels))
            if fraction < 1 and costs.fraction(path[-1]) > budget:
                continue
            table, _ = finer_within(path, costs, budget, cls.name)
            cells, finer = rule.cells(description.layers), len(table[0]) // REGIONS
            thinned = [bin_ for layer, at in cells for bin_ in table[layer][at * finer : (at + 1) * finer]]
            keep = sum(thinned) / (10 * len(thinned))
            return Hand(KeepSchedule.solved(table, costs, budget), fraction, fraction, keep)
        raise AssertionError("the widest rule either fits or raises")


def _path(rule: Hand, layers: int, levels: Sequence[int]) -> Iterator[Table]:
    table = constant_table(layers, REGIONS)
    yield table
    for high, low in zip(levels[:0:-1], levels[-2::-1], strict=True):
        for cell in rule.cells(layers):
            table = moved(table, cell, low - high)
            yield table
