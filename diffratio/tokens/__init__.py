"""Pure tensor functions and frozen data about tokens: grids, plans, matching."""

from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.plan import KeepPlan, MergePlan, Plan

__all__ = ["KeepPlan", "MergePlan", "Plan", "TokenGrid"]
