"""NSGA-II is pymoo's; here are its problem, its mutation and its repair. The only module that imports pymoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.pntx import TwoPointCrossover
from pymoo.operators.crossover.ux import UniformCrossover

from diffratio.search.space import Codes, Space

SWAPS = 0.3  # share of the offspring in which two neighbouring steps are exchanged: the cost stays, the place moves


class _Schedules(Problem):
    def __init__(self, space: Space, objectives: Callable[[Codes], tuple[float, float]]) -> None:
        super().__init__(n_var=space.steps, n_obj=2, xl=0, xu=len(space.alphabet) - 1, vtype=int)
        self.objectives = objectives

    def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = np.array([self.objectives(tuple(map(int, row))) for row in x])


class _Mutation(Mutation):
    """One step in the mean is drawn anew; sometimes two neighbours are exchanged as well."""

    def _do(self, problem: Any, x: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        x = x.copy()
        drawn = random_state.integers(0, problem.xu[0] + 1, size=x.shape)
        change = random_state.random(x.shape) < 1 / x.shape[1]
        x[change] = drawn[change]
        for row in np.flatnonzero(random_state.random(len(x)) < SWAPS):
            if x.shape[1] > 2:
                at = int(random_state.integers(1, x.shape[1] - 1))
                x[row, [at, at + 1]] = x[row, [at + 1, at]]
        return x


class _Repair(Repair):
    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def _do(self, problem: Any, x: Any, **kwargs: Any) -> Any:
        return np.array([self.space.repaired(row) for row in x], dtype=int)


def evolve(
    space: Space,
    first: list[Codes],
    size: int,
    generations: int,
    seed: int,
    objectives: Callable[[Codes], tuple[float, float]],
    after: Callable[[int], object] = lambda generation: None,
) -> None:
    """Runs NSGA-II; what it asks for follows from the seed and the answers alone, so a run replays from its answers.

    Args:
        space: of the schedules.
        first: the first population, repaired.
        size: of the others.
        generations: populations that are evaluated, the first one included; fewer where the space is exhausted.
        seed: of selection, crossover and mutation.
        objectives: schedule -> error and cost, both lower is better.
        after: called with the number of every generation that is done, from 1.
    """
    crossover = TwoPointCrossover(prob=0.9) if space.steps > 3 else UniformCrossover(prob=0.9)
    algorithm = NSGA2(
        pop_size=size,
        sampling=np.array(first, dtype=int),
        crossover=crossover,
        mutation=_Mutation(),
        repair=_Repair(space),
        seed=seed,
        termination=NoTermination(),
    )
    algorithm.setup(_Schedules(space, objectives), seed=seed, termination=NoTermination())
    for generation in range(1, generations + 1):
        asked = algorithm.ask()
        if asked is None or not len(asked):
            return
        algorithm.evaluator.eval(algorithm.problem, asked)
        algorithm.tell(infills=asked)
        after(generation)
