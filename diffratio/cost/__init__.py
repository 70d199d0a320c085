"""What things cost: runs, analytic MACs, latency."""

from diffratio.cost.macs import Cost, Description
from diffratio.cost.run import SamplingRun, StepContext, uniform_run

__all__ = ["Cost", "Description", "SamplingRun", "StepContext", "uniform_run"]
