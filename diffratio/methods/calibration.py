"""Budgets of methods whose cost is measured: a search over a knob and a number of blocks that asks for few runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

from diffratio.errors import BudgetUnreachable
from diffratio.routing.schedule import SLACK

T = TypeVar("T")
LARGEST_THRESHOLD, SMALLEST_THRESHOLD = 64.0, 1e-4
LARGEST_INTERVAL = 16
_HALVINGS = 14  # of the range of thresholds, on a logarithmic scale
_TRIED = 8  # stronger settings of the knob whose number of blocks is searched


def first_within(
    name: str,
    measure: Callable[[float, int], float],
    config: Callable[[float, int], T],
    budget: float,
    *,
    neutral: float,
    integers: bool,
    counts: Sequence[int],
    every: int,
) -> T:
    """The mildest setting that costs within [budget - 0.01, budget].

    Costs should fall with the knob and with the number of blocks; where they do so only nearly (a cache decides by what
    it caused itself), the search still returns nothing that was not measured.

    Args:
        name: of the method, for errors.
        measure: (knob, blocks) -> fraction of the dense run that a run with them costs.
        config: (knob, blocks) -> the setting.
        budget: fraction of the dense run.
        neutral: the knob at which nothing is saved.
        integers: whether the knob is an interval of whole steps; otherwise it is a threshold.
        counts: numbers of blocks that may be tried, rising; empty where all take part.
        every: number of all blocks.

    Raises:
        BudgetUnreachable: with the cheapest and the dearest that was measured, and the nearest costs.
    """
    seen: dict[tuple[float, int], float] = {}

    @functools.cache
    def cost(knob: float, blocks: int) -> float:
        seen[knob, blocks] = measure(knob, blocks)
        return seen[knob, blocks]

    def fits(knob: float, blocks: int) -> bool:
        return budget - SLACK <= cost(knob, blocks) <= budget + 1e-12

    if fits(neutral, every):
        return config(neutral, every)
    knobs = _intervals(cost, every, budget) if integers else _thresholds(cost, every, budget)
    for knob in sorted(knobs, key=lambda one: -cost(one, every)):
        if fits(knob, every):
            return config(knob, every)
    below = sorted((one for one in knobs if cost(one, every) < budget), key=lambda one: -cost(one, every))
    for knob in _distinct(below, lambda one: cost(one, every))[:_TRIED]:
        low, high = 0, len(counts) - 1
        while low < high:  # the fewest blocks with which the budget holds
            middle = (low + high) // 2
            low, high = (low, middle) if cost(knob, counts[middle]) <= budget + 1e-12 else (middle + 1, high)
        if counts and fits(knob, counts[low]):
            return config(knob, counts[low])
    costs = sorted(set(seen.values()))
    near = ", ".join(f"{one:.3f}" for one in sorted(sorted(costs, key=lambda one: abs(one - budget))[:2]))
    hint = f"measured next to it: {near}; a run of more steps is finer" if costs[0] < budget else ""
    raise BudgetUnreachable(name, budget, (costs[0], costs[-1]), hint)


def _intervals(cost: Callable[[float, int], float], every: int, budget: float) -> list[float]:
    """Intervals up to the mildest within the budget, and some stronger ones."""
    tried: list[float] = []
    for interval in range(2, LARGEST_INTERVAL + 1):
        tried.append(float(interval))
        if sum(cost(one, every) < budget for one in tried) >= _TRIED:
            break
    return tried


def _thresholds(cost: Callable[[float, int], float], every: int, budget: float) -> list[float]:
    """Thresholds around the mildest within the budget, and stronger ones between it and the strongest."""
    low, high = SMALLEST_THRESHOLD, LARGEST_THRESHOLD
    tried = [high]
    if cost(high, every) > budget:
        return tried
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        tried.append(middle)
        here = cost(middle, every)
        low, high = (low, middle) if here <= budget + 1e-12 else (middle, high)
        if budget - SLACK <= here <= budget + 1e-12:
            return tried
    return tried


def _distinct(knobs: Sequence[float], key: Callable[[float], float]) -> list[float]:
    """One of each cost."""
    return list({round(key(knob), 9): knob for knob in reversed(knobs)}.values())[::-1]
