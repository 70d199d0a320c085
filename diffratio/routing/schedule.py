"""Keep schedules: the frozen integer table that inference runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffratio.cost.macs import ALL_BINS, BINS, UNITS, CostTable, check_bins, tokens_of_bin
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError, shortened, unknown

Table = tuple[tuple[int, ...], ...]
SLACK = 0.01  # a budget is met within [budget - SLACK, budget]
_MAX_SIDE = 4096


@dataclass(frozen=True)
class KeepSchedule:
    """bins[layer][region] with the run its budget was solved for.

    Args:
        bins: keep ratio of each cell in tenths, 0..10; 10 is dense, 0 bypasses the block.
        run: the run whose steps the budget counts.
        budget: fraction of the dense run's cost that was asked for, in the schedule's unit.
        alignment: computed tokens are rounded up to a multiple of this.
        allowed_bins: what the cells were chosen from; bins that do not pay on the target hardware are missing.
        unit: what the budget counts: `macs`, `latency` or `mean_ratio`.
    """

    bins: Table
    run: SamplingRun
    budget: float = 1.0
    alignment: int = 1
    allowed_bins: tuple[int, ...] = ALL_BINS
    unit: str = "macs"

    def __post_init__(self) -> None:
        bins = tuple(tuple(row) for row in self.bins)
        object.__setattr__(self, "bins", bins)
        layers, regions = len(bins), len(bins[0]) if bins else 0
        if not 1 <= layers <= _MAX_SIDE or not 1 <= regions <= _MAX_SIDE or any(len(row) != regions for row in bins):
            raise DiffratioError(
                f"keep schedule: bins must be a table of 1..{_MAX_SIDE} layers x 1..{_MAX_SIDE} regions of equal length"
            )
        for layer, row in enumerate(bins):
            for region, bin_ in enumerate(row):
                if type(bin_) is not int or bin_ not in BINS:
                    raise DiffratioError(
                        f"keep schedule: bins[{layer}][{region}] is {shortened(bin_)}; allowed are the integers 0..10"
                    )
        if not 0 < self.budget <= 1:
            raise DiffratioError(f"keep schedule: budget {self.budget!r} is outside (0, 1]")
        if type(self.alignment) is not int or not 1 <= self.alignment <= 4096:
            raise DiffratioError(f"keep schedule: alignment {self.alignment!r} must be an integer in 1..4096")
        object.__setattr__(self, "allowed_bins", check_bins(self.allowed_bins, "keep schedule"))
        if missing := {bin_ for row in bins for bin_ in row} - set(self.allowed_bins):
            raise DiffratioError(
                f"keep schedule: bin {min(missing)} is used and not in allowed_bins {list(self.allowed_bins)}"
            )
        if not isinstance(self.unit, str) or self.unit not in UNITS:
            raise unknown("unit of a keep schedule", self.unit, UNITS)

    @classmethod
    def solved(cls, bins: Table, costs: CostTable, budget: float) -> KeepSchedule:
        """The schedule of a table that was solved on a cost table: its run, unit, alignment and allowed bins."""
        return cls(bins, costs.run, budget, costs.alignment, costs.allowed_bins, costs.unit)

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.bins)

    @property
    def regions(self) -> int:
        """Number of regions R."""
        return len(self.bins[0])

    def kept(self, layer: int, region: int, tokens: int) -> int:
        """Computed tokens k of N in a cell."""
        return tokens_of_bin(self.bins[layer][region], tokens, self.alignment)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse. Unit and allowed bins are left out where they are the usual ones."""
        document: dict[str, Any] = {
            "bins": [list(row) for row in self.bins],
            "run": self.run.to_json(),
            "budget": self.budget,
            "alignment": self.alignment,
        }
        if self.allowed_bins != ALL_BINS:
            document["allowed_bins"] = list(self.allowed_bins)
        if self.unit != "macs":
            document["unit"] = self.unit
        return document

    @classmethod
    def from_json(cls, document: Any) -> KeepSchedule:
        """Raises DiffratioError where the document is not a schedule."""
        try:
            rows = tuple(tuple(row) for row in document["bins"])
            run = SamplingRun.from_json(document["run"])
            allowed, unit = document.get("allowed_bins", ALL_BINS), document.get("unit", "macs")
            return cls(rows, run, float(document["budget"]), document["alignment"], allowed, unit)
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, DiffratioError):
                raise
            raise DiffratioError(f"not a keep schedule: {type(error).__name__} {error}") from None


def constant_table(layers: int, regions: int, bin_: int = 10) -> Table:
    """The same bin everywhere."""
    return tuple((bin_,) * regions for _ in range(layers))


def moved(table: Table, cell: tuple[int, int], step: int) -> Table:
    """The table with one cell moved by `step` bins."""
    return tuple(
        tuple(bin_ + step if (layer, region) == cell else bin_ for region, bin_ in enumerate(row))
        for layer, row in enumerate(table)
    )


def first_within(path: Sequence[Table], costs: CostTable, budget: float, method: str) -> Table:
    """The dearest table of a path of falling cost that costs within [budget - 0.01, budget].

    Raises:
        BudgetUnreachable: no table of the path does.
    """
    for table in path:
        fraction = costs.fraction(table)
        if fraction <= budget:
            if fraction >= budget - SLACK:
                return table
            break
    fractions = [costs.fraction(table) for table in path]
    raise BudgetUnreachable(method, budget, (min(fractions), max(fractions)))


def finer_within(path: Sequence[Table], costs: CostTable, budget: float, method: str) -> tuple[Table, float]:
    """`first_within`; where one move of the path is too coarse, it is made in a part of its region only.

    The noisiest part goes first; the table then has a multiple of the path's regions.

    Args:
        path: tables of falling cost, neighbours of which differ in at most one cell.
        costs: cost table of the run.
        budget: fraction of the dense run.
        method: whose name an error carries.

    Returns:
        The table and its place on the path, in moves; a fraction where a move was made in part.

    Raises:
        BudgetUnreachable: the path does not pass there.
    """
    try:
        table = first_within(path, costs, budget, method)
        return table, float(path.index(table))
    except BudgetUnreachable as error:
        unreachable = error
    after = next((place for place, table in enumerate(path) if costs.fraction(table) <= budget), 0)
    if not after:
        raise unreachable
    high, low = path[after - 1], path[after]
    layer, region = next(
        (layer, region)
        for layer, row in enumerate(low)
        for region, bin_ in enumerate(row)
        if bin_ != high[layer][region]
    )
    step = low[layer][region] - high[layer][region]
    for finer in (2, 4, 5, 10, 20):
        table = tuple(tuple(bin_ for bin_ in row for _ in range(finer)) for row in high)
        for part in range(1, finer):
            table = moved(table, (layer, (region + 1) * finer - part), step)
            if budget - SLACK <= costs.fraction(table) <= budget:
                return table, after - 1 + part / finer
    raise unreachable


def raised(table: Table, allowed: Sequence[int]) -> Table:
    """The table with every bin raised to the next allowed one (allowed: rising, 10 the last)."""
    up = [min(bin_ for bin_ in allowed if bin_ >= wanted) for wanted in BINS]
    return tuple(tuple(up[bin_] for bin_ in row) for row in table)


def round_to_budget(
    ratios: Sequence[Sequence[float]],
    costs: CostTable,
    budget: float,
    harm: Sequence[Sequence[float]] | None = None,
) -> Table:
    """Rounds ratios [layer][region] to bins that cost within [budget - 0.01, budget].

    From the nearest allowed bins, cells move to a neighbouring allowed bin at a time, each time the one of least
    predicted harm for its cost: down until the budget holds, then up wherever a whole step still fits.

    Args:
        ratios: keep ratios in [0.1, 1].
        costs: cost table of the run.
        budget: fraction of the dense run.
        harm: predicted rise of the loss for a unit decrease of each ratio (minus the loss gradient). A curvature of the
            mean slope a bin is added: slopes are noisy, and alone they send a cell far from its ratio. None takes the
            squared distance from the unrounded ratio alone.

    Raises:
        BudgetUnreachable: no table of allowed bins from 1 on costs that little.
    """
    layers, regions, levels = len(ratios), len(ratios[0]), costs.levels
    lowest = costs.fraction(constant_table(layers, regions, levels[0]))
    if budget < lowest:
        raise BudgetUnreachable("rounding", budget, (lowest, 1.0))
    below, above = dict(zip(levels[1:], levels, strict=False)), dict(zip(levels, levels[1:], strict=False))

    def nearest(ratio: float) -> int:  # of two as near the even one, as `round` does
        return min(levels, key=lambda level: (abs(level - 10 * ratio), level % 2))

    table = tuple(tuple(nearest(ratio) for ratio in row) for row in ratios)
    cells = [(layer, region) for layer in range(layers) for region in range(regions)]
    counts = costs.run.region_forwards(regions)

    slopes = [[max(value, 0.0) for value in row] for row in harm] if harm is not None else [[0.0] * regions] * layers
    typical = (sum(map(sum, slopes)) / len(cells)) or 1.0

    def penalty(layer: int, region: int, bin_: int) -> float:
        """Predicted rise of the loss at a bin: the slope, and a curvature that keeps noisy slopes from going far."""
        distance = ratios[layer][region] - bin_ / 10
        return slopes[layer][region] * distance + typical * distance**2 / 0.1

    def predicted(cell: tuple[int, int], bin_: int, to: int) -> float:
        """Predicted rise of the loss for moving a cell from `bin_` to another, per unit of cost."""
        layer, region = cell
        change = abs(costs.cells[layer][bin_] - costs.cells[layer][to]) * counts[region]
        return (penalty(layer, region, to) - penalty(layer, region, bin_)) / max(change, 1e-12)

    while costs.fraction(table) > budget:
        falling = {c: (at, below[at]) for c in cells if (at := table[c[0]][c[1]]) in below and counts[c[1]] > 0}
        cell = min(falling, key=lambda c: predicted(c, *falling[c]))
        table = moved(table, cell, falling[cell][1] - falling[cell][0])
    while True:
        fitting = []
        for layer, region in cells:
            bin_ = table[layer][region]
            if bin_ in above and counts[region] > 0:
                higher = moved(table, (layer, region), above[bin_] - bin_)
                if costs.fraction(higher) <= budget:
                    fitting.append((predicted((layer, region), bin_, above[bin_]), higher))
        if not fitting or costs.fraction(table) >= budget - SLACK / 4:
            return table
        table = min(fitting, key=lambda pair: pair[0])[1]
