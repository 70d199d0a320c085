"""Sensitivity maps: what each block, region and bin does to the output, and the schedules that follow from it."""

from diffratio.sensitivity.measure import MeasureSettings, calibrate, measure_sensitivity, solved
from diffratio.sensitivity.store import Sensitivity, load_sensitivity, save_sensitivity, weights_digest

__all__ = [
    "MeasureSettings",
    "Sensitivity",
    "calibrate",
    "load_sensitivity",
    "measure_sensitivity",
    "save_sensitivity",
    "solved",
    "weights_digest",
]
