"""`todo`: token downsampling (ToDo, arXiv 2402.13573): keys and values from a coarser grid, training-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.cost.macs import BlockUse, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import Method, MethodConfig, check_budget, register
from diffratio.methods.merging import from_middle
from diffratio.routing.schedule import SLACK
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import strided_tokens
from diffratio.tokens.plan import AttentionPlan

SITE = "self_attention"
HIGHEST = 4


@dataclass(frozen=True)
class ToDo(MethodConfig):
    """Self-attention of all queries to every f-th token in both directions of the grid; nothing is matched.

    Args:
        factor: f in 1..4, for all blocks or one for each; higher keeps fewer keys (about N / f^2), 1 keeps all.
    """

    factor: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,)
        if not factors or any(type(one) is not int or not 1 <= one <= HIGHEST for one in factors):
            raise DiffratioError(
                f"todo: factor {self.factor!r} must be an integer in 1..{HIGHEST} (1 keeps all keys), or a list of one "
                "for each block"
            )

    def factors(self, layers: int) -> tuple[int, ...]:
        """One factor for each block.

        Raises:
            DiffratioError: there are as many factors as blocks of another model.
        """
        if isinstance(self.factor, int):
            return (self.factor,) * layers
        if len(self.factor) != layers:
            raise DiffratioError(f"todo: {len(self.factor)} factors do not fit a model of {layers} blocks")
        return self.factor

    @property
    def as_published(self) -> bool:
        """Whether all blocks share one factor."""
        return isinstance(self.factor, int)


@register
class ToDoMethod(Method):
    """One fixed set of keys for each factor, the same at every step and in both guidance halves."""

    name = "todo"
    config_class = ToDo
    indexes_attention = True

    def __init__(self, config: ToDo, description: Description) -> None:
        super().__init__(config, description)
        self.factors = config.factors(description.layers)
        self.plans: dict[tuple[TokenGrid, int, torch.device], AttentionPlan] = {}

    def sites(self) -> tuple[str, ...]:
        """Self-attention, where there is something to leave out."""
        return (SITE,) if max(self.factors) > 1 else ()

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> AttentionPlan | None:
        """Made at the block's input, before what may be compiled, and handed out at the site."""
        factor = self.factors[layer]
        if factor == 1 or site not in ("block", SITE):
            return None
        key = (ctx.grid, factor, x.device)
        if site == "block":
            if key not in self.plans:
                self.plans[key] = AttentionPlan(ctx.grid.tokens, strided_tokens(ctx.grid, factor)[None].to(x.device))
            return None
        return self.plans[key]

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """All queries and the kept keys."""
        if self.factors[layer] == 1:
            return BlockUse()
        return BlockUse({SITE: (run.grid.tokens, kept_keys(run.grid, self.factors[layer]))})

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> ToDo:
        """The smallest factors that do: the middle blocks get the larger ones. Whole blocks are the finest step."""
        budget, layers = check_budget(budget), description.layers
        if budget == 1:
            return ToDo()
        order = from_middle(layers)

        def fraction(config: ToDo) -> float:
            return cls(config, description).macs(run).fraction

        def config(counts: tuple[int, ...]) -> ToDo:
            """`counts` blocks of factor 4, 3 and 2, from the middle outwards."""
            flat = [4] * counts[0] + [3] * counts[1] + [2] * counts[2]
            factors = dict(zip(order, flat, strict=False))
            row = tuple(factors.get(layer, 1) for layer in range(layers))
            return ToDo(row[0] if len(set(row)) == 1 else row)

        lowest = fraction(ToDo(HIGHEST))
        # what a factor saves in the first blocks of the order; blocks add up, what is chosen is priced exactly below
        saved = {factor: [0.0] for factor in (4, 3, 2)}
        for factor, sums in saved.items():
            for layer in order:
                alone = tuple(factor if one == layer else 1 for one in range(layers))
                sums.append(sums[-1] + 1 - fraction(ToDo(alone)))
        for most in range(2, HIGHEST + 1):
            fitting = []
            for counts in _counts(layers, most):
                ends = (0, *itertools.accumulate(counts))
                parts = zip((4, 3, 2), ends, ends[1:], strict=False)
                predicted = 1 - sum(saved[factor][end] - saved[factor][start] for factor, start, end in parts)
                if budget - SLACK <= predicted <= budget + 1e-9:
                    fitting.append((predicted, counts))
            for _, counts in sorted(fitting, reverse=True):
                found = config(counts)
                if budget - SLACK <= fraction(found) <= budget + 1e-12:
                    return found
        hint = "queries and the MLP stay at full length; one block is the finest step of its factor"
        raise BudgetUnreachable(cls.name, budget, (lowest, 1.0), hint)


def kept_keys(grid: TokenGrid, factor: int) -> int:
    """Number of keys M that a factor keeps: rows and columns 0, f, 2f, ..."""
    return -(-grid.height // factor) * -(-grid.width // factor)


def _counts(layers: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Numbers of blocks of factor 4, 3 and 2, none above `most`, at most `layers` together."""
    for four in range(layers + 1 if most >= 4 else 1):
        for three in range(layers - four + 1 if most >= 3 else 1):
            for two in range(layers - four - three + 1):
                yield four, three, two
