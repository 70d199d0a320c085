"""What is learned: flow matching, noise prediction, distillation; where noise levels come from; validation losses."""

from diffratio.objectives.base import FlowMatching, Noised, NoisePrediction, Objective, get_objective, objectives
from diffratio.objectives.draws import noise_levels, sample_draws

__all__ = [
    "FlowMatching",
    "NoisePrediction",
    "Noised",
    "Objective",
    "get_objective",
    "noise_levels",
    "objectives",
    "sample_draws",
]
