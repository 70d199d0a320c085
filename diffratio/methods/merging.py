"""What merging methods share: who plans for whom, state that follows a run, and the search for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError, unknown
from diffratio.methods.base import Method
from diffratio.routing.schedule import SLACK
from diffratio.tokens.grid import TokenGrid

SITES = ("self_attention", "cross_attention", "feed_forward")
CELL = 2
HIGHEST = 1 - 1 / CELL**2

T = TypeVar("T")


def check_number(method: str, name: str, value: Any, low: float, high: float, why: str) -> None:
    """Raises DiffratioError for what is not a number in [low, high]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise DiffratioError(f"{method}: {name} {value!r} is outside [{low:g}, {high:g}]: {why}")


def check_count(method: str, name: str, value: Any, least: int, what: str) -> None:
    """Raises DiffratioError for what is not an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise DiffratioError(f"{method}: {name} must be an integer of at least {least} ({what}), got {value!r}")


def check_sites(method: str, sites: Any) -> None:
    """Raises DiffratioError unless it names one or more known sites, each once."""
    if not isinstance(sites, tuple) or not sites or len(set(sites)) != len(sites):
        raise DiffratioError(f"{method}: sites {sites!r} must name one or more of {', '.join(SITES)}, each once")
    for site in sites:
        if site not in SITES:
            raise unknown(f"{method} site", site, SITES)


def check_layers(method: str, layers: Iterable[int] | None, description: Description) -> tuple[int, ...]:
    """The merging blocks in order; None is all of them."""
    chosen = tuple(range(description.layers)) if layers is None else tuple(sorted(set(layers)))
    if any(layer not in range(description.layers) for layer in chosen):
        raise DiffratioError(f"{method}: layers {layers} do not fit a model of {description.layers} blocks")
    return chosen


def check_cells(method: str, grid: TokenGrid, cell: int) -> int:
    """Number of whole cells of a grid.

    Raises:
        DiffratioError: there is none, so that nothing could be merged.
    """
    cells = (grid.height // cell) * (grid.width // cell)
    if cells == 0:
        raise DiffratioError(
            f"{method}: a {grid.height}x{grid.width} token grid holds no whole {cell}x{cell} cell to merge in; "
            "use a larger sample or another method"
        )
    return cells


def from_middle(layers: int) -> list[int]:
    """Blocks from the middle outwards."""
    return sorted(range(layers), key=lambda layer: (abs(layer - (layers - 1) / 2), layer))


def whole(amount: float, turn: int, mix: bool) -> int:
    """A whole number for an amount: its floor, or with `mix` one of its two neighbours.

    Mixed, the turns 0, 1, 2 ... take turns between the neighbours so that their mean is the amount, to within one.
    """
    if not mix:
        return int(amount)
    return math.floor((turn + 1) * amount + 1e-6) - math.floor(turn * amount + 1e-6)


@dataclass(frozen=True)
class Sharing:
    """Which merging block plans for which.

    Args:
        layers: the merging blocks in order.
        blocks: how many of them, one after the other, share a plan; None is all.
        steps: how many steps, one after the other, share a plan.
    """

    layers: tuple[int, ...]
    blocks: int | None = 1
    steps: int = 1

    def group(self, layer: int) -> int:
        """Number of the plan that a merging block uses."""
        return 0 if self.blocks is None else self.layers.index(layer) // self.blocks

    def turn(self, layer: int, step: int) -> int:
        """Number of the plan in the order in which a run makes them."""
        groups = 1 if self.blocks is None else -(-len(self.layers) // self.blocks)
        return step // self.steps * groups + self.group(layer)

    def leads(self, layer: int) -> bool:
        """Whether a merging block is the first of its group, which is where the plan is made."""
        at = self.layers.index(layer)
        return at == 0 if self.blocks is None else at % self.blocks == 0

    def renews(self, step: int) -> bool:
        """Whether plans are made anew in this step."""
        return step % self.steps == 0


class RunState(Generic[T]):
    """Something that a method carries from step to step of one run.

    A step that is forwarded a second time sees what the first time saw, and a new run starts from nothing.

    Attributes:
        value: what the previous step left, None at step 0; not to be changed in place.
        next: what this step leaves.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self.at: int | None = None
        self.value: T | None = None
        self.next: T | None = None

    def begin(self, step: int) -> None:
        """Enters a step.

        Raises:
            DiffratioError: steps were left out.
        """
        if step == 0:
            self.value = None
        elif self.at == step - 1:
            self.value = self.next
        elif self.at != step:
            raise DiffratioError(
                f"{self.method} follows a run step by step, but step {step} came after "
                f"{'none' if self.at is None else f'step {self.at}'}: begin a new run with scheduler.set_timesteps"
            )
        self.at, self.next = step, None


def same_samples(method: str, state: Tensor, samples: int) -> Tensor:
    """The state (samples, ...), unless the batch has changed within a run."""
    if len(state) != samples:
        raise DiffratioError(
            f"{method}: this run began with {len(state)} samples and now has {samples}; "
            "begin a new run with scheduler.set_timesteps"
        )
    return state


class Ladder(Sequence[T]):
    """Configs from the dearest to the cheapest, each made when it is asked for."""

    def __init__(self, rungs: int, make: Callable[[int], T]) -> None:
        self.rungs, self.make = max(0, rungs), make

    def __len__(self) -> int:
        return self.rungs

    def __getitem__(self, at: Any) -> Any:
        if not 0 <= at < self.rungs:
            raise IndexError(at)
        return self.make(at)


def dearest_on_ladders(
    cls: type[Method],
    ladders: Iterable[Sequence[Any]],
    description: Description,
    run: SamplingRun,
    budget: float,
    hint: str = "",
) -> Any:
    """The first ladder's dearest config that costs within [budget - 0.01, budget], found by bisection.

    Args:
        cls: the method.
        ladders: in order of preference; each falls in cost from its first config to its last.
        description: the transformer.
        run: the run.
        budget: fraction of the dense run's MACs.
        hint: what would widen the range.

    Raises:
        BudgetUnreachable: no ladder has one.
    """

    def fraction(config: Any) -> float:
        return cls(config, description).macs(run).fraction

    lowest = 1.0
    for ladder in ladders:
        if not len(ladder):
            continue
        cheapest = fraction(ladder[len(ladder) - 1])
        lowest = min(lowest, cheapest)
        if cheapest > budget:
            continue
        above, below = -1, len(ladder) - 1  # below always fits, above never does
        while below - above > 1:
            middle = (above + below) // 2
            above, below = (middle, below) if fraction(ladder[middle]) > budget else (above, middle)
        config = ladder[below]
        if fraction(config) >= budget - SLACK:
            return config
    raise BudgetUnreachable(cls.name, budget, (lowest, 1.0), hint)
