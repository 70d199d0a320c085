"""`random_keep`: as many tokens as `mod` keeps, chosen at random."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.cost.macs import CostTable, Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.methods.base import register
from diffratio.methods.fixed import FixedConfig, FixedMethod
from diffratio.methods.mod import mean_keep, spread, uniform_schedule
from diffratio.routing.schedule import Table


@dataclass(frozen=True)
class RandomKeep(FixedConfig):
    """The control of what a router adds: the same counts, tokens at random.

    Args:
        ranking: only `random`.
        keep: mean keep ratio; lower keeps fewer tokens. Between two bins, blocks of both are spread evenly.
    """

    ranking: str = "random"
    keep: float = 1.0

    def __post_init__(self) -> None:
        if self.ranking != "random":
            raise DiffratioError(f"random_keep: ranking {self.ranking!r} is not 'random'; for another use measured")
        if not 0 < self.keep <= 1:
            raise DiffratioError(f"random_keep: keep {self.keep!r} is outside (0, 1]; it is the fraction kept")

    def preset(self, layers: int) -> Table:
        """Two neighbouring bins, spread evenly over the blocks."""
        return spread(layers, 1, max(layers, round(10 * self.keep * layers)))


@register
class RandomKeepMethod(FixedMethod):
    """Uniform counts, random tokens."""

    name = "random_keep"
    config_class = RandomKeep
    takes_costs = True

    @classmethod
    def for_budget(
        cls, description: Description, run: SamplingRun, budget: float, *, costs: CostTable | None = None
    ) -> RandomKeep:
        """As `mod`, without the cost of its routers; a table of milliseconds holds them, so there it stays below."""
        schedule = uniform_schedule(description, run, budget, cls.name, router=False, costs=costs)
        return RandomKeep(schedule, keep=mean_keep(schedule))
