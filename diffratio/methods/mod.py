"""`mod`: Mixture-of-Depths with one keep ratio everywhere (arXiv 2404.02258)."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.cost.macs import CostTable, Description, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import check_budget, register
from diffratio.methods.routed import RoutedConfig, RoutedMethod
from diffratio.routing.schedule import KeepSchedule, Table, first_within


@dataclass(frozen=True)
class MoD(RoutedConfig):
    """The control that every learned schedule must beat at equal MACs.

    Args:
        keep: mean keep ratio; lower keeps fewer tokens. Between two bins, blocks of both are spread evenly.
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DiffratioError(f"mod: keep {self.keep!r} is outside (0, 1]; it is the fraction of tokens computed")

    def preset(self, layers: int) -> Table:
        """Two neighbouring bins, spread evenly over the blocks."""
        return spread(layers, 1, max(layers, round(10 * self.keep * layers)))


def spread(layers: int, regions: int, total: int) -> Table:
    """A table whose bins add up to `total`, the remainder spread evenly over the cells."""
    cells = layers * regions
    low, extra = divmod(total, cells)
    flat = [low + ((cell + 1) * extra // cells - cell * extra // cells) for cell in range(cells)]
    return tuple(tuple(flat[layer * regions : (layer + 1) * regions]) for layer in range(layers))


@register
class MoDMethod(RoutedMethod):
    """Uniform routing."""

    name = "mod"
    config_class = MoD
    takes_costs = True

    @classmethod
    def for_budget(
        cls, description: Description, run: SamplingRun, budget: float, *, costs: CostTable | None = None
    ) -> MoD:
        """Lowers one cell by one bin at a time, evenly spread; regions join only where blocks alone are too coarse."""
        schedule = uniform_schedule(description, run, budget, cls.name, costs=costs)
        return MoD(schedule, mean_keep(schedule))


def uniform_schedule(
    description: Description,
    run: SamplingRun,
    budget: float,
    method: str,
    router: bool = True,
    costs: CostTable | None = None,
) -> KeepSchedule:
    """The dearest uniform schedule within a budget: one cell falls by one allowed bin at a time, evenly spread.

    Args:
        description: the transformer.
        run: the run whose steps the budget counts.
        budget: fraction of its dense MACs; lower keeps fewer tokens.
        method: whose name an error carries.
        router: whether ranking tokens costs a router.
        costs: cost table of the run, for a budget in its unit; None counts MACs.

    Raises:
        BudgetUnreachable: below what one bin everywhere costs.
    """
    budget, layers = check_budget(budget), description.layers
    costs = costs or macs_table(description, run, router=router)
    levels = costs.levels
    for regions in (1, 4, 20):
        cells = layers * regions
        path = [
            tuple(tuple(levels[place] for place in row) for row in spread(layers, regions, total))
            for total in range((len(levels) - 1) * cells, -1, -1)
        ]
        try:
            return KeepSchedule.solved(first_within(path, costs, budget, method), costs, budget)
        except BudgetUnreachable as error:
            unreachable = error
    raise unreachable


def mean_keep(schedule: KeepSchedule) -> float:
    """Mean keep ratio over the cells of a schedule."""
    return sum(map(sum, schedule.bins)) / (10 * schedule.layers * schedule.regions)
