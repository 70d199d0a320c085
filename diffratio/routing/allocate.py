"""Exact allocation of bins on a measured sensitivity map: error model, knapsack, local search, paths.

Everything is float64 and pure. A move is written (region, layer, bin); rows of the Gram matrices are layer * 11 + bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from diffratio.cost.macs import BINS, CostTable
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.routing.schedule import SLACK, Table, constant_table, finer_within, moved, raised

_BINS = len(BINS)
_MOST_MOVES = 1500  # above that many moves, pairs are tried among those by one bin alone


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Predicts the output error of any table from changes of one cell each.

    With delta(l, b) the change of the output when block l of the base table takes bin b, and e0 the base table's own
    difference from the dense output, region j of a table has the error
    |e0|^2 + 2 <e0, sum delta> + sum of <delta, delta'>, a mean over samples and output elements.

    Args:
        base: the table around which was measured, bins[layer][region].
        gram: E<delta, delta'> (R, 11 L, 11 L), zero at the base's own bins.
        cross: E<e0, delta> (R, 11 L).
        offset: E|e0|^2 (R,).
        weights: what a unit of error in each region counts (R,).
    """

    base: Table
    gram: Tensor
    cross: Tensor
    offset: Tensor
    weights: Tensor

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.base)

    @property
    def regions(self) -> int:
        """Number of regions R."""
        return len(self.base[0])

    def region_errors(self, table: Sequence[Sequence[int]]) -> Tensor:
        """Predicted error of each region, unweighted (R,)."""
        rows = self.rows(table)
        cross = self.cross.gather(1, rows).sum(1)
        each = torch.stack([gram[index][:, index].sum() for gram, index in zip(self.gram, rows, strict=True)])
        return self.offset + 2 * cross + each

    def error(self, table: Sequence[Sequence[int]]) -> float:
        """Predicted error of a table, weighted over regions."""
        return float(self.weights @ self.region_errors(table))

    def singles(self) -> Tensor:
        """Weighted change of the error when one cell alone takes a bin, (R, L, 11)."""
        diagonal = torch.diagonal(self.gram, dim1=1, dim2=2)
        return (self.weights[:, None] * (2 * self.cross + diagonal)).view(self.regions, self.layers, _BINS)

    def weighted(self, weights: Sequence[float]) -> ErrorModel:
        """The same measurement under other weights of the regions."""
        return replace(self, weights=torch.tensor(list(weights), dtype=torch.float64))

    def rows(self, table: Sequence[Sequence[int]]) -> Tensor:
        """Rows of the Gram matrices that a table chooses, (R, L)."""
        bins = torch.tensor([list(row) for row in table]).T  # (R, L)
        return bins + torch.arange(self.layers) * _BINS


def knapsack(values: Tensor, costs: Sequence[Sequence[int]], capacity: int) -> tuple[int, ...] | None:
    """Chooses one option of every group: the least sum of values whose integer costs fit, exactly.

    Args:
        values: (groups, options); infinity forbids an option.
        costs: integer cost of each option, at least 0.
        capacity: largest allowed sum of costs.

    Returns:
        The option of each group, or None where nothing fits.
    """
    lowest = [min(row) for row in costs]
    room = capacity - sum(lowest)
    if room < 0:
        return None
    best = torch.zeros(room + 1, dtype=torch.float64)
    choices: list[Tensor] = []
    for row, price, least in zip(values.double(), costs, lowest, strict=True):
        options = torch.full((len(price), room + 1), math.inf, dtype=torch.float64)
        for option, cost in enumerate(price):
            extra = cost - least
            if extra <= room:
                options[option, extra:] = best[: room + 1 - extra] + row[option]
        best, choice = options.min(dim=0)
        choices.append(choice)
    if math.isinf(float(best[room])):
        return None
    left, chosen = room, []
    for choice, price, least in zip(reversed(choices), reversed(list(costs)), reversed(lowest), strict=True):
        option = int(choice[left])
        chosen.append(option)
        left -= price[option] - least
    return tuple(reversed(chosen))


def allocate(
    model: ErrorModel,
    costs: CostTable,
    budget: float,
    ceiling: Table | None = None,
    interactions: bool = True,
    resolution: int = 20_000,
) -> Table:
    """The table of least predicted error that costs at most the budget.

    The diagonal alone is solved exactly (a multiple-choice knapsack by dynamic programming over integer cost). With
    interactions the result is refined by moves of one cell or of two at once, from there and from a greedy descent.

    Args:
        model: the error model.
        costs: cost of each block by bin, in any unit.
        budget: fraction of the dense run; lower keeps fewer tokens. It is never exceeded.
        ceiling: highest bin of each cell, lowered to one that the costs allow; the default is the model's base.
        interactions: whether terms between two cells count; False uses the diagonal alone.
        resolution: largest number of integer cost units; exact where costs are multiples of one of them, otherwise
            costs are rounded up.

    Returns:
        A table within [budget - 0.01, budget] where single bins are fine enough, else the best below the budget.

    Raises:
        BudgetUnreachable: every allowed table costs more.
    """
    search = _Search(model, costs, budget, ceiling or model.base)
    table = search.best(resolution, interactions)
    if costs.fraction(table) > budget:  # the same sum, added up in another order: only its last bit is above
        search = _Search(model, costs, budget * (1 - 1e-12), ceiling or model.base)
        table = search.best(resolution, interactions)
    return table


class _Search:
    """One allocation problem with its cost of every move."""

    def __init__(self, model: ErrorModel, costs: CostTable, budget: float, ceiling: Table) -> None:
        self.model, self.costs, self.budget = model, costs, budget
        under = [max((low for low in costs.allowed_bins if low <= bin_), default=costs.levels[0]) for bin_ in BINS]
        self.ceiling: Table = tuple(tuple(under[bin_] for bin_ in row) for row in ceiling)
        self.allowed_bins = torch.tensor([bin_ in costs.allowed_bins for bin_ in BINS])
        counts = costs.run.region_counts(model.regions)
        self.cells = torch.tensor(costs.cells, dtype=torch.float64)  # (L, 11)
        self.price = self.cells[None] * torch.tensor(counts, dtype=torch.float64)[:, None, None]  # (R, L, 11)
        self.capacity = costs.run.steps * (budget * costs.dense - costs.outer)
        self.floor = self.capacity - SLACK * costs.run.steps * costs.dense
        highest = torch.tensor([list(row) for row in self.ceiling]).T[..., None]  # (R, L, 1)
        self.allowed = (torch.arange(_BINS) <= highest) & self.allowed_bins
        for region, count in enumerate(counts):
            if count == 0:  # nothing to save there
                self.allowed[region] = torch.arange(_BINS) == highest[region]
        gram = model.weights[:, None, None] * model.gram
        self.gram, self.cross = gram, model.weights[:, None] * model.cross

    def best(self, resolution: int, interactions: bool) -> Table:
        """The best of what the starts lead to."""
        exact = self.solved(resolution)
        if not interactions:
            return self.filled(exact, interactions)
        free = [self.refined(start) for start in (exact, self.descended())]
        found = [self.refined(self.filled(start), self.floor) for start in (exact, *free)]
        above = [table for table in found if self.cost(table) >= self.floor]
        return min(above or found, key=self.model.error)

    def cost(self, table: Table) -> float:
        """Cost of the blocks of a table over the run."""
        bins = torch.tensor([list(row) for row in table]).T[..., None]
        return float(self.price.gather(2, bins).sum())

    def solved(self, resolution: int) -> Table:
        """The exact optimum of the diagonal."""
        values = torch.where(self.allowed, self.model.singles(), math.inf).flatten(0, 1)
        prices = [row.tolist() for row in self.price.flatten(0, 1)]
        unit = _unit(prices, max(self.capacity, 1.0), resolution)
        forbidden = math.ceil(max(map(max, prices)) / unit) + 1
        integer = [
            [math.ceil(price / unit - 1e-9) if ok else forbidden for price, ok in zip(row, allowed, strict=True)]
            for row, allowed in zip(prices, self.allowed.flatten(0, 1).tolist(), strict=True)
        ]
        chosen = knapsack(values, integer, math.floor(self.capacity / unit + 1e-9))
        while chosen is not None and self.cost(self._table(chosen)) > self.capacity:
            # rounding of the unit itself, seen only where costs are not exact multiples of it
            chosen = knapsack(values, integer, sum(row[c] for row, c in zip(integer, chosen, strict=True)) - 1)
        if chosen is None:
            return self._cheapest()
        return self._table(chosen)

    def descended(self) -> Table:
        """From the ceiling down by the moves of least error for their cost, cells that cancel in pairs."""
        table = self.ceiling
        while (cost := self.cost(table)) > self.capacity:
            moves, error, change = self._moves(table)
            if cost + float(change.min()) > self.capacity:
                choice = torch.where(change < 0, error / change.neg().clamp_min(1e-300), math.inf)
            else:  # the last move: by error alone among those that suffice
                choice = torch.where(cost + change <= self.capacity, error, math.inf)
            table = self._moved(table, moves, int(choice.argmin()))
        return table

    def refined(self, table: Table, floor: float = -math.inf) -> Table:
        """Local search: the best move of one cell or two that stays between floor and capacity, until none helps."""
        scale = abs(self.model.error(table)) + 1e-30
        while True:
            moves, error, change = self._moves(table)
            cost = self.cost(table) + change
            error = torch.where((cost <= self.capacity) & (cost >= floor), error, math.inf)
            choice = int(error.argmin())
            if not float(error.flatten()[choice]) < -1e-10 * scale:
                return table
            table = self._moved(table, moves, choice)

    def filled(self, table: Table, interactions: bool = True) -> Table:
        """Spends what is left of the budget until its lower edge is reached, at the least error."""
        while (cost := self.cost(table)) < self.floor:
            moves, error, change = self._moves(table, interactions)
            useful = (change > 0) & (cost + change <= self.capacity)
            if not useful.any():
                return table
            table = self._moved(table, moves, int(torch.where(useful, error, math.inf).argmin()))
        return table

    def _moves(self, table: Table, interactions: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs of moves of one cell each.

        Moves are numbered (region * L + layer) * 11 + bin; one to the present bin changes nothing, so that pairs with
        such a one are single moves.

        Returns:
            The moves (T,), and the change of error and of cost of each pair, both (T, T).
        """
        layers = self.model.layers
        now = self.model.rows(table)  # (R, L), rows of the Gram matrices
        own = now.repeat_interleave(_BINS, 1)  # (R, 11 L): the present row of each row's layer
        rows = self.gram - self.gram.gather(1, own[..., None].expand_as(self.gram))
        between = rows - rows.gather(2, own[:, None].expand_as(rows))  # (R, 11 L, 11 L)
        sums = self.gram.gather(2, now[:, None].expand(-1, self.gram.shape[1], -1)).sum(2) + self.cross
        alone = 2 * (sums - sums.gather(1, own)) + torch.diagonal(between, dim1=1, dim2=2)
        price = self.price.flatten(1)
        change = price - price.gather(1, own)
        valid = self.allowed.flatten(1).clone().scatter_(1, now, True)
        if int(valid.sum()) > _MOST_MOVES:
            place = self.allowed_bins.cumsum(0).repeat(layers)  # neighbours among the allowed bins differ by one
            valid &= (place - place[own]).abs() <= 1
        moves = valid.flatten().nonzero()[:, 0]
        alone, change = alone.flatten()[moves], change.flatten()[moves]
        region, row, cell = moves // (layers * _BINS), moves % (layers * _BINS), moves // _BINS
        error = alone[:, None] + alone[None]
        if interactions:
            together = 2 * between[region[:, None], row[:, None], row[None]]
            error = error + torch.where(region[:, None] == region[None], together, 0.0)
        still = row == now.flatten()[cell]
        same = (cell[:, None] == cell[None]) & ~(still[:, None] & still[None])
        total = change[:, None] + change[None]
        if len(self.ceiling) * self.model.regions == 1:  # a lone cell has no other to stay still beside it
            same = same & ~still[:, None]
        return moves, torch.where(same, math.inf, error), torch.where(same, 0.0, total)

    def _moved(self, table: Table, moves: Tensor, choice: int) -> Table:
        layers = self.model.layers
        bins = [list(row) for row in table]
        for move in (int(moves[choice // len(moves)]), int(moves[choice % len(moves)])):
            cell, bin_ = divmod(move, _BINS)
            region, layer = divmod(cell, layers)
            if bin_ != table[layer][region]:
                bins[layer][region] = bin_
        return tuple(map(tuple, bins))

    def _table(self, chosen: Sequence[int]) -> Table:
        layers = self.model.layers
        return tuple(tuple(chosen[r * layers + layer] for r in range(self.model.regions)) for layer in range(layers))

    def _cheapest(self) -> Table:
        prices = torch.where(self.allowed, self.price, math.inf)
        table = self._table(prices.argmin(2).flatten().tolist())
        if self.cost(table) > self.capacity:
            reachable = (self.costs.fraction(table), self.costs.fraction(self.ceiling))
            raise BudgetUnreachable("allocation", self.budget, reachable)
        return table


def _unit(prices: Sequence[Sequence[float]], capacity: float, resolution: int) -> float:
    """The greatest common divisor of integer costs where that is coarse enough, else capacity / resolution."""
    flat = [price for row in prices for price in row]
    if all(price == int(price) for price in flat):
        common = reduce(math.gcd, (int(price) for price in flat))
        if common and capacity / common <= resolution:
            return float(common)
    return capacity / resolution


@dataclass(frozen=True)
class Path:
    """An ordered list of single-bin decrements from the dense table: it serves every budget.

    Args:
        layers: number of blocks L.
        regions: number of regions R.
        cells: (layer, region) of each decrement.
        errors: predicted error after each decrement.
    """

    layers: int
    regions: int
    cells: tuple[tuple[int, int], ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.cells) != len(self.errors):
            raise DiffratioError(f"path: {len(self.cells)} decrements and {len(self.errors)} errors")
        for table in self.tables():
            if min(map(min, table)) < 0:
                raise DiffratioError("path: a cell falls below bin 0")

    def tables(self) -> Iterator[Table]:
        """The dense table and the one after each decrement."""
        table = constant_table(self.layers, self.regions)
        yield table
        for cell in self.cells:
            table = moved(table, cell, -1)
            yield table

    def within(self, costs: CostTable, budget: float, method: str = "measured") -> tuple[Table, float]:
        """The first table that costs within [budget - 0.01, budget], and its predicted error.

        Where one decrement is coarser than that, it is made in a part of its region only, noisiest part first: the
        table then has a multiple of the path's regions, and its error lies between those of its two neighbours. Bins
        that the costs do not allow are raised to the next one that they do: the error is then an upper bound.

        Raises:
            BudgetUnreachable: the path does not pass there.
        """
        path = [raised(table, costs.allowed_bins) for table in self.tables()]
        errors = (0.0, *self.errors)
        table, place = finer_within(path, costs, budget, method)
        before = int(place)
        share = place - before
        return table, errors[before] if not share else (1 - share) * errors[before] + share * errors[before + 1]


def ordered(model: ErrorModel, costs: CostTable, start: Table, end: Table) -> tuple[list[tuple[int, int]], list[float]]:
    """Single-bin decrements from one table to a lower one, each time the one of least error for its cost.

    Returns:
        The cells (layer, region) in order, and the predicted error after each.
    """
    counts = costs.run.region_counts(model.regions)
    cells, errors, table = [], [], start
    while table != end:
        here = model.error(table)
        options = []
        for layer, row in enumerate(table):
            for region, bin_ in enumerate(row):
                if bin_ > end[layer][region]:
                    lower = moved(table, (layer, region), -1)
                    saved = counts[region] * (costs.cells[layer][bin_] - costs.cells[layer][bin_ - 1])
                    rise = model.error(lower) - here
                    options.append((rise / max(saved, 1e-12), (layer, region), lower))
        _, cell, table = min(options, key=lambda option: option[:2])
        cells.append(cell)
        errors.append(model.error(table))
    return cells, errors


def walk(measure: Callable[[Table], ErrorModel], first: ErrorModel, costs: CostTable, targets: Sequence[float]) -> Path:
    """Walks the budget down and measures anew around each table that it reaches.

    Args:
        measure: a table -> the error model around it.
        first: the model around the dense table.
        costs: cost table of the run.
        targets: falling fractions of the dense run.

    Returns:
        The path from the dense table to the last target.

    Raises:
        BudgetUnreachable: a target below what remains when every block is bypassed.
    """
    model, table = first, first.base
    cells: list[tuple[int, int]] = []
    errors: list[float] = []
    for number, target in enumerate(targets):
        lower = allocate(model, costs, target, ceiling=table)
        there, predicted = ordered(model, costs, table, lower)
        cells, errors, table = cells + there, errors + predicted, lower
        if number + 1 < len(targets):
            model = measure(table)
    return Path(first.layers, first.regions, tuple(cells), tuple(errors))
