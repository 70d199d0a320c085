"""`guidance_interval`: no unconditional half at some steps (arXiv 2404.07724)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.actions import StepAction
from diffratio.methods.base import Method, MethodConfig, check_budget, check_guidance, dearest_within, register

PLACEMENTS = ("middle_kept", "both_ends", "noisy_first", "clean_first")


@dataclass(frozen=True)
class GuidanceInterval(MethodConfig):
    """Evaluates the conditional half alone at some steps; there the guided prediction is the conditional one.

    Args:
        skip: how many steps go without guidance: a fraction of the steps (a float in [0, 1]) or a number (an integer).
            Higher skips more.
        placement: which steps. `middle_kept`: guidance stays in an interval of noise levels around `centre`, as in the
            paper, which gives one for each model; `both_ends`: equally many steps from either end; `noisy_first`,
            `clean_first`: from one end.
        centre: noise level u in [0, 1] around which `middle_kept` keeps guidance.

    Source: arXiv 2404.07724, section 3: guidance harms at high noise levels and is needless at low ones.
    """

    skip: float = 0.0
    placement: str = "middle_kept"
    centre: float = 0.5

    def __post_init__(self) -> None:
        whole = type(self.skip) is int and self.skip >= 0
        if not whole and not (isinstance(self.skip, float) and 0 <= self.skip <= 1):
            raise DiffratioError(
                f"guidance_interval: skip {self.skip!r} is neither a number of steps (integer from 0) nor a fraction "
                "of them (float in [0, 1])"
            )
        if self.placement not in PLACEMENTS:
            raise unknown("guidance_interval placement", self.placement, PLACEMENTS)
        if not 0 <= self.centre <= 1:
            raise DiffratioError(f"guidance_interval: centre {self.centre!r} is outside [0, 1]; it is a noise level")

    def count(self, steps: int) -> int:
        """Steps without guidance, of so many; a fraction is rounded to the nearest whole."""
        return min(steps, self.skip if isinstance(self.skip, int) else round(self.skip * steps))

    def order(self, noise_levels: Sequence[float]) -> list[int]:
        """The steps in the order in which they lose guidance."""
        steps = list(range(len(noise_levels)))
        if self.placement == "noisy_first":
            return steps
        if self.placement == "clean_first":
            return steps[::-1]
        if self.placement == "both_ends":
            return [steps[-1 - i // 2] if i % 2 else steps[i // 2] for i in steps]
        # rounded: equally far levels on either side must not change places by a last bit; the noisier one goes first
        return sorted(steps, key=lambda step: (-round(abs(noise_levels[step] - self.centre), 9), step))


@register
class GuidanceIntervalMethod(Method):
    """Chooses the guided steps; surgery evaluates the conditional half alone at the others."""

    name = "guidance_interval"
    config_class = GuidanceInterval
    token_level = False
    needs_guidance = True

    def guided(self, run: SamplingRun) -> tuple[bool, ...] | None:
        """All steps but the first `count` of the placement's order; what the run leaves out already stays out."""
        if run.guidance == "none":
            return None
        skipped = set(self.config.order(run.noise_levels)[: self.config.count(run.steps)])
        return tuple(run.halves_at(step) == 2 and step not in skipped for step in range(run.steps))

    def begin_step(self, ctx: StepContext) -> StepAction | None:
        """Refuses a batch of both halves that stands in no run: which step it is cannot be known."""
        if ctx.run is None and ctx.halves in ("cond_first", "uncond_first"):
            raise DiffratioError(
                "guidance_interval decides step by step and needs an open run: diffratio.attach_(pipe) first, then "
                "sample with the pipeline"
            )
        return None

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> GuidanceInterval:
        """Whole steps only: not every budget is within 0.01 of one."""
        check_guidance(cls, run)
        candidates = [GuidanceInterval(skip=count / run.steps) for count in range(run.steps + 1)]
        hint = f"each of the {run.steps} steps without guidance saves 1/{2 * run.steps}; a run of more steps is finer"
        return dearest_within(cls, candidates, description, run, check_budget(budget), hint)
