"""`diffratio compare`: every arm on the same weights, noise and labels; one record each, then the report."""

from __future__ import annotations

from diffratio.evaluation.compare.plan import plan_text
from diffratio.evaluation.compare.running import Latents, compare_from_config
from diffratio.evaluation.compare.settings import CompareSettings, TrainedArm

__all__ = ["CompareSettings", "Latents", "TrainedArm", "compare_from_config", "plan_text"]
