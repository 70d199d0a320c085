"""`fewer_steps`: the dense model at the step count that costs the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.methods.base import Method, MethodConfig, check_budget, dearest_within, register


@dataclass(frozen=True)
class FewerSteps(MethodConfig):
    """Samples in fewer, uniformly placed steps.

    Args:
        keep: fraction of the steps that is evaluated; lower evaluates fewer. The count is rounded to the nearest whole.
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DiffratioError(f"fewer_steps: keep {self.keep!r} is outside (0, 1]; it is a fraction of the steps")

    def steps(self, steps: int) -> int:
        """How many steps stand for `steps` dense ones; the sampler spaces them by its own rule."""
        return max(1, round(self.keep * steps))


@register
class FewerStepsMethod(Method):
    """Every token in every block, at fewer steps."""

    name = "fewer_steps"
    config_class = FewerSteps
    token_level = False

    def adapt(self, run: SamplingRun) -> SamplingRun:
        """The run with its levels placed anew: the same curve of levels, read at fewer points."""
        steps = self.config.steps(run.steps)
        levels = (*run.noise_levels, 0.0)

        def level(at: float) -> float:
            low = min(int(at), run.steps - 1)
            return levels[low] + (at - low) * (levels[low + 1] - levels[low])

        positions = [i * run.steps / steps for i in range(steps)]
        guided = None if run.guided is None else tuple(run.guided[int(at)] for at in positions)
        return replace(run, noise_levels=tuple(level(at) for at in positions), guided=guided)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> FewerSteps:
        """Whole steps only: not every budget is within 0.01 of one."""
        candidates = [FewerSteps(keep=steps / run.steps) for steps in range(1, run.steps + 1)]
        hint = f"{run.steps} steps can only be cut to multiples of 1/{run.steps}; a run of more steps is finer"
        return dearest_within(cls, candidates, description, run, check_budget(budget), hint)
