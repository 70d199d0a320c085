"""`measured`: a keep schedule from measured output error, without training."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.cost.macs import CostTable, Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable
from diffratio.methods.base import check_budget, register
from diffratio.methods.fixed import FixedConfig, FixedMethod


@dataclass(frozen=True)
class Measured(FixedConfig):
    """A schedule that a sensitivity map solved; with no arguments nothing is routed yet.

    `diffratio measure` writes the map, `method.schedule=FILE` solves it for a budget; in Python
    `diffratio.calibrate("measured", ...)` or `diffratio.load_sensitivity(file).schedule(...)`.
    """


@register
class MeasuredMethod(FixedMethod):
    """The control that a learned schedule must beat: one that costs a minute of measuring."""

    name = "measured"
    config_class = Measured
    takes_costs = True

    @classmethod
    def for_budget(
        cls, description: Description, run: SamplingRun, budget: float, *, costs: CostTable | None = None
    ) -> Measured:
        """Only 1, in any unit: a description alone holds no measurement.

        Raises:
            BudgetUnreachable: any other budget; says how to measure.
        """
        if check_budget(budget) < 1:
            hint = (
                "its schedule is measured on the weights: `diffratio measure EXPERIMENT --out FILE`, then "
                "method.schedule=FILE; in Python diffratio.calibrate('measured', transformer, batches, budget)"
            )
            raise BudgetUnreachable(cls.name, budget, (1.0, 1.0), hint)
        return Measured()
