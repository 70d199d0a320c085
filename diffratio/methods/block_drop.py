"""`block_drop`: whole blocks are bypassed in every step, those whose absence changes least first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffratio.cost.macs import CostTable, Description, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import check_budget, register
from diffratio.methods.fixed import FixedConfig, FixedMethod, ranking_costs
from diffratio.routing.schedule import KeepSchedule, Table, constant_table, first_within, moved


@dataclass(frozen=True)
class BlockDrop(FixedConfig):
    """Depth pruning, the coarsest schedule there is.

    Args:
        ranking: of the tokens in the one cell that a budget may leave between all and none.
        blocks: indices of the bypassed blocks, where no schedule is given.
    """

    ranking: str = "strided"
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranking == "router":
            raise DiffratioError("block_drop: it ranks no tokens; ranking is one of deviation, strided, random")
        if any(type(block) is not int or block < 0 for block in self.blocks):
            raise DiffratioError(f"block_drop: blocks {self.blocks!r} must be indices of blocks, integers from 0")

    @property
    def as_published(self) -> bool:
        """Whether every block is either bypassed or whole in all steps."""
        rows = self.schedule.bins if self.schedule else ()
        return all(set(row) in ({0}, {10}) for row in rows)

    def preset(self, layers: int) -> Table:
        """0 for the named blocks, 10 for the others."""
        if any(block >= layers for block in self.blocks):
            raise DiffratioError(f"block_drop: blocks {self.blocks} do not fit a model of {layers} blocks")
        return tuple((0 if layer in self.blocks else 10,) for layer in range(layers))


@register
class BlockDropMethod(FixedMethod):
    """Bypass of whole blocks."""

    name = "block_drop"
    config_class = BlockDrop
    takes_costs = True

    @classmethod
    def for_budget(
        cls,
        description: Description,
        run: SamplingRun,
        budget: float,
        order: Sequence[int] | None = None,
        *,
        costs: CostTable | None = None,
    ) -> BlockDrop:
        """Bypasses blocks in order until the budget holds.

        Where whole blocks are too coarse, the last one is bypassed in a part of the regions only, and where even a
        region is too coarse, in one of them it computes a part of its tokens.

        Args:
            description: the transformer.
            run: the run whose steps the budget counts.
            budget: fraction of its dense cost; lower bypasses more.
            order: blocks in the order in which they go; the default is from the middle outwards, `diffratio.calibrate`
                finds the order of least change.
            costs: cost table of that run, for a budget in its unit; None counts MACs.

        Raises:
            BudgetUnreachable: below what is computed outside the blocks.
            DiffratioError: an order that is no permutation of the blocks.
        """
        budget, layers = check_budget(budget), description.layers
        chosen = middle_out(layers) if order is None else tuple(order)
        if sorted(chosen) != list(range(layers)):
            raise DiffratioError(f"block_drop: order {chosen} must name each of the {layers} blocks once")
        costs = costs or macs_table(description, run, router=ranking_costs(BlockDrop.ranking))
        if costs.allowed_bins[0] != 0:
            raise DiffratioError("block_drop: bypassing a block does not pay on this cost table; choose another method")
        for regions, bins in ((1, False), (4, False), (20, False), (20, True)):
            levels = costs.allowed_bins if bins else (0, 10)
            try:
                table = first_within(_path(chosen, regions, levels), costs, budget, cls.name)
            except BudgetUnreachable as error:
                unreachable = error
                continue
            return BlockDrop(KeepSchedule.solved(table, costs, budget), blocks=_bypassed(table))
        raise unreachable


def middle_out(layers: int) -> tuple[int, ...]:
    """All blocks, from the middle outwards: first and last blocks matter most in every published measurement."""
    return tuple(sorted(range(layers), key=lambda layer: (abs(layer - (layers - 1) / 2), layer)))


def _path(order: Sequence[int], regions: int, levels: Sequence[int]) -> list[Table]:
    """Tables of falling cost: block after block, in a block region after region, noisiest first."""
    table = constant_table(len(order), regions)
    path = [table]
    for layer in order:
        for region in reversed(range(regions)):
            for high, low in zip(levels[:0:-1], levels[-2::-1], strict=True):
                table = moved(table, (layer, region), low - high)
                path.append(table)
    return path


def _bypassed(table: Table) -> tuple[int, ...]:
    return tuple(layer for layer, row in enumerate(table) if set(row) == {0})
