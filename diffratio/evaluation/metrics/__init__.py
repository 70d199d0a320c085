"""Quality and efficiency figures: pure functions of features, images and times, and the table that names them.

A new metric is one function in a file of its theme and one row in `table.METRICS` (or `optional.OPTIONAL_METRICS` where
it needs a package or weights from outside). `streaming` holds KID and FD as torchmetrics objects for a training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.metrics.base import Metric
from diffratio.evaluation.metrics.distances import FD, KID, fd, kid, kid_difference
from diffratio.evaluation.metrics.images import PSNR_CEILING, psnr, ssim
from diffratio.evaluation.metrics.nearest import Nearest, feature_distance, nearest_distance
from diffratio.evaluation.metrics.optional import OPTIONAL_METRICS
from diffratio.evaluation.metrics.probe import Accuracy, Probe, class_accuracy, find_probe, load_probe
from diffratio.evaluation.metrics.sets import SetFigure, clip_score, cmmd, inception_score, precision_recall
from diffratio.evaluation.metrics.table import DEFAULT_METRICS, METRICS, check_metrics, measure, require_samples
from diffratio.evaluation.metrics.timing import efficiency
from diffratio.evaluation.statistics import Estimate, paired_difference

if TYPE_CHECKING:
    from diffratio.evaluation.metrics.streaming import FDLite0, KIDLite0

__all__ = [
    "DEFAULT_METRICS",
    "FD",
    "KID",
    "METRICS",
    "OPTIONAL_METRICS",
    "PSNR_CEILING",
    "Accuracy",
    "Estimate",
    "Evidence",
    "FDLite0",
    "KIDLite0",
    "Metric",
    "Nearest",
    "Probe",
    "SetFigure",
    "check_metrics",
    "class_accuracy",
    "clip_score",
    "cmmd",
    "efficiency",
    "fd",
    "feature_distance",
    "find_probe",
    "inception_score",
    "kid",
    "kid_difference",
    "load_probe",
    "measure",
    "nearest_distance",
    "paired_difference",
    "precision_recall",
    "psnr",
    "require_samples",
    "ssim",
]


def __getattr__(name: str) -> Any:
    # torchmetrics takes a second to import, and only a training loop needs its classes
    if name in ("FDLite0", "KIDLite0"):
        from diffratio.evaluation.metrics import streaming

        return getattr(streaming, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
