"""Sensitivity maps: what each block, region and bin does to the output, and the schedules that follow from it."""

from diffratio.sensitivity.measure import CALIBRATED, MeasureSettings, calibrate, measure_sensitivity, solved
from diffratio.sensitivity.store import (
    Sensitivity,
    find_map,
    load_sensitivity,
    required_map,
    save_sensitivity,
    weights_digest,
)
from diffratio.sensitivity.verify import verify

__all__ = [
    "CALIBRATED",
    "MeasureSettings",
    "Sensitivity",
    "calibrate",
    "find_map",
    "load_sensitivity",
    "measure_sensitivity",
    "required_map",
    "save_sensitivity",
    "solved",
    "verify",
    "weights_digest",
]
