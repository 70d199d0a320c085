"""The table of metrics, and how a comparison walks it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from diffratio.errors import DiffratioError, unknown
from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.metrics.base import Metric
from diffratio.evaluation.metrics.distances import FD_MINIMUM, KID, KID_MINIMUM, fd, kid, kid_difference
from diffratio.evaluation.metrics.holes import hole_feature_distance, hole_psnr, hole_ssim
from diffratio.evaluation.metrics.images import PAIRED_MINIMUM, psnr, ssim
from diffratio.evaluation.metrics.nearest import feature_distance, nearest_distance
from diffratio.evaluation.metrics.optional import OPTIONAL_METRICS, require_package
from diffratio.evaluation.metrics.probe import applicable_accuracy
from diffratio.evaluation.metrics.retrieval import applicable_retrieval
from diffratio.evaluation.statistics import Estimate, paired_difference


def measure(names: Iterable[str], evidence: Evidence) -> dict[str, Any]:
    """Figures by metric name, as plain data for a record.

    Args:
        names: of `METRICS` or `OPTIONAL_METRICS`; those that do not apply (distance to dense, for the dense model) are
            left out.
        evidence: what was generated.

    Raises:
        DiffratioError: an unknown name, a package that is missing, fewer samples than a metric needs, features of
            another extractor than the metric is named after, or an optional metric without what it looks at.
    """
    found: dict[str, Any] = {}
    for name in check_metrics(names):
        require_samples(name, len(evidence.images))
        metric = _row(name)
        _require_features(name, metric, evidence)
        value = metric.measure(evidence)
        if value is not None:
            found[name] = [asdict(one) for one in value] if isinstance(value, list) else asdict(value)
    return found


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; worth calling before anything is generated.

    Raises:
        DiffratioError: one of them is in neither table, or needs a package that is not installed.
    """
    names = tuple(names)
    for name in names:
        require_package(name, _row(name))
    return names


def require_samples(name: str, n: int) -> None:
    """Checks that a metric is defined for n samples.

    Raises:
        DiffratioError: the metric is unknown, or needs more.
    """
    minimum = _row(name).minimum
    if n < minimum:
        raise DiffratioError(f"{name} needs at least {minimum} samples, got {n}; raise n")


def _row(name: str) -> Metric:
    metric = METRICS.get(name) or OPTIONAL_METRICS.get(name)
    if metric is None:
        raise unknown("metric", name, [*METRICS, *OPTIONAL_METRICS])
    return metric


def _require_features(name: str, metric: Metric, evidence: Evidence) -> None:
    wanted, found = metric.features, evidence.extractor
    if wanted is not None and found is not None and not found.startswith(wanted):
        raise DiffratioError(
            f"{name} stands for {wanted!r} features, got those of {found!r}: reference and samples must be of "
            f"{wanted!r}; extract both with Lite0Features, or call the pure function and name the figure otherwise"
        )


def _kid_vs_dense(e: Evidence) -> KID | None:
    return kid_difference(e.reference, e.features, e.dense.features) if e.dense else None


def _excess_loss(e: Evidence) -> Estimate | None:
    if e.losses is None or e.reference_losses is None or e.losses is e.reference_losses:
        return None
    return paired_difference(e.losses.mean(1), e.reference_losses.mean(1))


def _excess_loss_regions(e: Evidence) -> list[Estimate] | None:
    if e.losses is None or e.reference_losses is None or e.losses is e.reference_losses:
        return None
    return [paired_difference(a, b) for a, b in zip(e.losses.T, e.reference_losses.T, strict=True)]


METRICS: dict[str, Metric] = {
    "kid_lite0": Metric(
        "squared MMD to the reference x 1000, cubic kernel, EfficientNet-Lite0 features",
        "lower",
        KID_MINIMUM,
        lambda e: kid(e.reference, e.features),
        features="lite0",
    ),
    "kid_lite0_vs_dense": Metric(
        "kid_lite0 minus the dense model's at the same noise, paired",
        "lower",
        KID_MINIMUM,
        _kid_vs_dense,
        features="lite0",
    ),
    "fd_lite0": Metric(
        "Frechet distance to the reference, EfficientNet-Lite0 features, at this n only",
        "lower",
        FD_MINIMUM,
        lambda e: fd(e.reference, e.features),
        features="lite0",
    ),
    "psnr": Metric(
        "peak signal-to-noise ratio to the dense model's images at the same noise, dB",
        "higher",
        PAIRED_MINIMUM,
        lambda e: psnr(e.images, e.dense.images) if e.dense else None,
    ),
    "ssim": Metric(
        "structural similarity to the dense model's images at the same noise",
        "higher",
        PAIRED_MINIMUM,
        lambda e: ssim(e.images, e.dense.images) if e.dense else None,
    ),
    "feature_distance": Metric(
        "L2 distance to the dense model's features at the same noise",
        "lower",
        PAIRED_MINIMUM,
        lambda e: feature_distance(e.features, e.dense.features) if e.dense else None,
    ),
    "hole_psnr": Metric(
        "peak signal-to-noise ratio to the true picture inside the hole, dB; for inpainting models",
        "higher",
        PAIRED_MINIMUM,
        lambda e: hole_psnr(e.images, e.known) if e.known else None,
    ),
    "hole_ssim": Metric(
        "structural similarity to the true picture, mean over the hole; for inpainting models",
        "higher",
        PAIRED_MINIMUM,
        lambda e: hole_ssim(e.images, e.known) if e.known else None,
    ),
    "hole_feature_distance": Metric(
        "L2 distance of the filled picture's features to the true picture's; for inpainting models",
        "lower",
        PAIRED_MINIMUM,
        lambda e: hole_feature_distance(e.features, e.reference) if e.known else None,
    ),
    "excess_loss": Metric(
        "validation loss minus the dense model's at the same noise, paired", "lower", PAIRED_MINIMUM, _excess_loss
    ),
    "excess_loss_regions": Metric(
        "excess_loss in each noise-level region", "lower", PAIRED_MINIMUM, _excess_loss_regions
    ),
    "class_accuracy": Metric(
        "share of samples that a probe on the features assigns to their condition; for data sets with a shipped probe",
        "higher",
        PAIRED_MINIMUM,
        applicable_accuracy,
    ),
    "caption_retrieval": Metric(
        "share of samples whose caption is among the first 10 of 100 by a linear map from features to text",
        "higher",
        PAIRED_MINIMUM,
        applicable_retrieval,
    ),
    "nearest_distance": Metric(
        "L2 distance to the nearest training image's features; far below its `real`, the held-out images' = memorised",
        "higher",
        PAIRED_MINIMUM,
        lambda e: nearest_distance(e.train(), e.features, e.reference) if e.train else None,
    ),
}
"""What works offline and with the `metrics` extra alone; `OPTIONAL_METRICS` holds the rest."""

DEFAULT_METRICS: tuple[str, ...] = tuple(METRICS)
"""What a comparison measures unless told otherwise; those that do not apply leave themselves out."""
