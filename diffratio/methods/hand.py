"""`hand`: a schedule by three numbers, what a person would write after reading the papers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffratio.cost.macs import Description, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.methods.base import check_budget, register
from diffratio.methods.routed import RoutedConfig, RoutedMethod
from diffratio.routing.schedule import KeepSchedule, Table, constant_table, first_within, moved

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

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> Hand:
        """Lowers the chosen cells bin by bin; half the blocks and levels first, then three quarters, then all."""
        budget = check_budget(budget)
        costs = macs_table(description, run)
        for fraction in (0.5, 0.75, 1.0):
            rule = Hand(blocks=fraction, levels=fraction)
            path = list(_path(rule, description.layers))
            if fraction < 1 and costs.fraction(path[-1]) > budget:
                continue
            table = first_within(path, costs, budget, cls.name)
            cells = rule.cells(description.layers)
            keep = sum(table[layer][region] for layer, region in cells) / (10 * len(cells))
            return Hand(KeepSchedule(table, run, budget), fraction, fraction, keep)
        raise AssertionError("the widest rule either fits or raises")


def _path(rule: Hand, layers: int) -> Iterator[Table]:
    table = constant_table(layers, REGIONS)
    yield table
    for _ in range(9):
        for cell in rule.cells(layers):
            table = moved(table, cell, -1)
            yield table
