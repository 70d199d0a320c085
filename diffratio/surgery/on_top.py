"""Budgets of step-level methods on top of what is applied already: a cache on a routed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffratio.backbones import backbone_of
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import Method, MethodConfig, check_budget, combined_cost, get_method
from diffratio.methods.block_cache import BlockCache
from diffratio.methods.step_schedule import StepSchedule
from diffratio.surgery.accounting import macs
from diffratio.surgery.schedules import find_step_schedule
from diffratio.surgery.state import attachment

GAP = 0.04
REACH, PARTS = 0.12, 48  # what a method costs alone is sought so far around the quotient of both budgets, in such parts


def check_on_top(name: str) -> type[Method]:
    """The method, which must be step-level, training-free and priced without running it.

    Raises:
        DiffratioError: it is not.
    """
    cls = get_method(name)
    if cls.token_level or cls.learned or not cls.static:
        why = "trained" if cls.learned else "priced by running it" if not cls.static else "token-level"
        raise DiffratioError(
            f"{name!r} is {why}; on top of a routed checkpoint go step-level methods: block_cache, fewer_steps, "
            "guidance_interval"
        )
    return cls


def for_budget_on_top(
    method: str, transformer: Any, budget: float, run: SamplingRun, file: str | Path | None = None
) -> MethodConfig:
    """The dearest config with which both together cost within [budget - 0.04, budget] of the dense run.

    Steps of a routed model cost differently, so what its steps can be cut to has gaps wider than the usual 0.01.

    Args:
        method: `block_cache`, `fewer_steps` or another step-level one.
        transformer: with a token-level method applied.
        budget: fraction of the dense run's MACs of both together.
        run: that run.
        file: of `block_cache`, a step schedule or a search's front: the dearest schedule within the budget that prunes
            nothing is taken, and none is too cheap.

    Raises:
        BudgetUnreachable: what is applied costs no more than the budget alone, or no setting does.
        DiffratioError: a method that does not go on top.
    """
    cls, state = check_on_top(method), attachment(transformer)
    description = backbone_of(transformer).describe(transformer)
    check_budget(budget)

    def price(config: MethodConfig) -> float:
        methods = [cls(config, description), *state.methods]
        adapted = run
        for one in methods:
            adapted = one.adapt(adapted)
        return combined_cost(methods, adapted, run).fraction

    alone = macs(transformer, run=run).fraction
    names = "+".join([*(one.name for one in state.methods), method])
    if alone <= budget:
        raise BudgetUnreachable(names, budget, (0.0, alone), "what is below it costs no more than that by itself")
    if file is not None:
        return cached_by(file, transformer, budget, run, price, same_weights=False)
    priced: dict[MethodConfig, float] = {}
    for part in range(-PARTS, PARTS + 1):
        share = budget / alone + REACH * part / PARTS
        if 0 < share <= 1:
            try:
                config = cls.for_budget(description, run, share)
            except BudgetUnreachable:
                continue
            if config not in priced:
                priced[config] = price(config)
    fitting = [(fraction, at) for at, fraction in enumerate(priced.values()) if budget - GAP <= fraction <= budget]
    if not fitting:
        found = (min(priced.values()), max(priced.values())) if priced else (0.0, alone)
        raise BudgetUnreachable(names, budget, found, "a run of more steps is finer")
    return list(priced)[max(fitting)[1]]


def cached_by(
    file: str | Path, transformer: Any, budget: float | None, run: SamplingRun, price: Any = None,
    same_weights: bool = True,
) -> BlockCache:  # fmt: skip
    """`block_cache` with the actions of a step schedule.

    Args:
        file: the schedule, or a front, of which the dearest one that prunes nothing and fits the budget is taken.
        transformer: what it is for.
        budget: fraction of the dense run's MACs; None takes a single schedule as it is.
        run: the run.
        price: config -> fraction; None takes what the cache costs alone.
        same_weights: whether the schedule must have been found on these weights.

    Raises:
        DiffratioError: no such file, or a schedule that prunes or is another model's.
        BudgetUnreachable: nothing in it is within the budget.
    """
    description = backbone_of(transformer).describe(transformer)

    def config_of(schedule: StepSchedule) -> BlockCache:
        return BlockCache(actions=tuple(choice.action for choice in schedule.over(run.steps)))

    def fraction(schedule: StepSchedule) -> float:
        if any(choice.ratio for choice in schedule.choices):
            return float("inf")
        config = config_of(schedule)
        return float(price(config)) if price else get_method("block_cache")(config, description).macs(run).fraction

    found = find_step_schedule(
        file, transformer, budget=budget, run=run, same_weights=same_weights, price=fraction, method="block_cache"
    )
    if any(choice.ratio for choice in found.choices):
        raise DiffratioError(f"block_cache: {str(file)!r} prunes tokens; dato carries it out")
    return config_of(found)
