"""Step schedules from files, fitted to a transformer, its weights and a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffratio.backbones import backbone_of
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.dato import DaTo, DaToMethod
from diffratio.methods.step_front import StepFront, read_schedules
from diffratio.methods.step_masks import is_mask, read_mask
from diffratio.methods.step_schedule import StepSchedule
from diffratio.surgery.digest import weights_digest


def find_step_schedule(
    path: str | Path,
    transformer: Any,
    *,
    budget: float | None = None,
    steps: int = 20,
    guidance: bool = True,
    run: SamplingRun | None = None,
    same_weights: bool = True,
    price: Callable[[StepSchedule], float] | None = None,
    method: str = "dato",
) -> StepSchedule:
    """The schedule of a file for a transformer; `DaTo(schedule=...)` carries it out.

    Args:
        path: a step schedule (JSON), a search's front (its file or folder), or a published list of computed steps
            (JSON or text, see `methods.step_masks.from_mask`).
        transformer: what it is for; on the meta device its weights are not compared.
        budget: of a front the dearest schedule within this fraction of the dense run is taken; of the others the
            schedule must cost no more.
        steps: shorthand for the backbone's default run of so many steps.
        guidance: whether that run has both guidance halves.
        run: the run itself, instead of the two above.
        same_weights: whether it must have been found on these weights.
        price: schedule -> fraction of the dense run's MACs; None takes what `dato` costs alone.
        method: that carries it out, for errors.

    Raises:
        DiffratioError: no such file, or a schedule of another model, other weights or too different a number of steps.
        BudgetUnreachable: nothing in it is within the budget.
    """
    backbone = backbone_of(transformer)
    run = run or backbone.default_run(transformer, steps, "cfg" if guidance else "none")
    description, own = backbone.describe(transformer), run

    def alone(schedule: StepSchedule) -> float:
        return DaToMethod(DaTo(schedule=schedule), description).macs(own).fraction

    price = price or alone
    known = same_weights and not next(transformer.parameters()).is_meta
    digest = weights_digest(transformer) if known else None
    try:
        if is_mask(path):
            found: StepSchedule | StepFront = read_mask(path, description, run)
        else:
            found = read_schedules(path)
        first = found.entries[0].schedule if isinstance(found, StepFront) else found
        first.require(description, digest).over(run.steps)
        if isinstance(found, StepFront):
            return found.within(budget, price, method).schedule.require(description, digest)
        if budget is not None and (fraction := price(found)) > budget + 1e-9:
            raise BudgetUnreachable(method, budget, (fraction, fraction), f"{str(path)!r} is a single schedule")
        return found
    except BudgetUnreachable:
        raise
    except DiffratioError as error:
        raise error if str(path) in str(error) else DiffratioError(f"{str(path)!r}: {error}") from None
