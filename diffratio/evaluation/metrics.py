"""Quality and efficiency figures and their registry: pure functions of features, images and times, float64 inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffratio.errors import DiffratioError, unknown
from diffratio.evaluation.distances import FD, FD_MINIMUM, KID, KID_MINIMUM, fd, kid, kid_difference
from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.statistics import Estimate, feature_sets, mean_estimate, paired_difference

__all__ = [
    "FD",
    "KID",
    "METRICS",
    "Estimate",
    "Evidence",
    "Metric",
    "check_metrics",
    "efficiency",
    "fd",
    "feature_distance",
    "kid",
    "kid_difference",
    "measure",
    "nearest_distance",
    "paired_difference",
    "psnr",
    "require_samples",
    "ssim",
]

PSNR_CEILING = 100.0
"""dB given to equal images, whose PSNR is infinite; float32 rounding of images in [-1, 1] lies above it."""
_CHUNK = 1024


@dataclass(frozen=True)
class Metric:
    """What a metric name stands for.

    Args:
        description: one line for tables and help.
        better: which direction is better.
        minimum: fewest samples that it is defined for.
        measure: the figure, a list of figures (one a region), or None where the evidence does not hold what it needs.
    """

    description: str
    better: Literal["lower", "higher"]
    minimum: int
    measure: Callable[[Evidence], Any]


def measure(names: Iterable[str], evidence: Evidence) -> dict[str, Any]:
    """Figures by metric name, as plain data for a record.

    Args:
        names: of `METRICS`; those that do not apply (distance to dense, for the dense model) are left out.
        evidence: what was generated.

    Raises:
        DiffratioError: an unknown name, or fewer samples than a metric needs.
    """
    found: dict[str, Any] = {}
    for name in check_metrics(names):
        require_samples(name, len(evidence.images))
        value = METRICS[name].measure(evidence)
        if value is not None:
            found[name] = [asdict(one) for one in value] if isinstance(value, list) else asdict(value)
    return found


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        DiffratioError: one of them is not in `METRICS`.
    """
    names = tuple(names)
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return names


def require_samples(name: str, n: int) -> None:
    """Checks that a metric is defined for n samples.

    Raises:
        DiffratioError: the metric is unknown, or needs more.
    """
    check_metrics([name])
    if n < METRICS[name].minimum:
        raise DiffratioError(f"{name} needs at least {METRICS[name].minimum} samples, got {n}; raise n")


def psnr(a: Tensor, b: Tensor) -> Estimate:
    """Mean over samples of the peak signal-to-noise ratio in dB.

    Args:
        a: images in [-1, 1], (n, C, H, W).
        b: the same samples from the other model, (n, C, H, W).

    Returns:
        Mean with its t interval over samples; higher is closer, equal images count as 100 dB.

    Raises:
        DiffratioError: different shapes, or fewer than 2 samples.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _image_pair("psnr", a, b)
    each = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return mean_estimate(each.clamp(max=PSNR_CEILING), "psnr")


def ssim(a: Tensor, b: Tensor) -> Estimate:
    """Mean over samples of the structural similarity (11 x 11 Gaussian window, sigma 1.5, mirrored borders).

    Images are shifted to [0, 2] first: SSIM's luminance term is not invariant to an offset, and around zero it is
    meaningless; shifted, the figure equals the usual one for intensities in [0, 1].

    Args:
        a: images in [-1, 1], (n, C, H, W), sides of at least 11.
        b: the same samples from the other model, (n, C, H, W).

    Returns:
        Mean with its t interval over samples; 1 is equal.

    Raises:
        DiffratioError: different shapes, images smaller than the window, or fewer than 2 samples.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _image_pair("ssim", a, b)
    if min(a.shape[-2:]) < 11:
        raise DiffratioError(f"ssim needs images of at least 11x11, got {a.shape[-2]}x{a.shape[-1]}; use psnr instead")
    each = structural_similarity_index_measure(a + 1, b + 1, data_range=2.0, reduction="none")
    assert isinstance(each, Tensor)
    return mean_estimate(each, "ssim")


def feature_distance(features_a: Tensor, features_b: Tensor) -> Estimate:
    """Mean Euclidean distance between the features of the same sample from two models.

    Args:
        features_a: (n, d).
        features_b: (n, d), same order.

    Returns:
        Mean with its t interval over samples; 0 is equal, lower is closer.

    Raises:
        DiffratioError: different shapes, fewer than 2 samples, or features that are not finite.
    """
    a, b = feature_sets("feature_distance", 2, a=features_a, b=features_b)
    if len(a) != len(b):
        raise DiffratioError(f"feature_distance pairs samples one to one, got {len(a)} and {len(b)}")
    return mean_estimate((a - b).norm(dim=1), "feature_distance")


def nearest_distance(train: Tensor, fake: Tensor) -> Estimate:
    """Mean Euclidean distance from a generated sample's features to those of the nearest training image.

    Args:
        train: features of the training images (m, d).
        fake: features of the generated samples (n, d).

    Returns:
        Mean with its t interval over generated samples; far below the same figure for held-out images = memorised.

    Raises:
        DiffratioError: fewer than 2 samples, different widths, or features that are not finite.
    """
    train, fake = feature_sets("nearest_distance", 2, train=train, fake=fake)
    nearest = torch.cat([torch.cdist(part, train).amin(dim=1) for part in fake.split(_CHUNK)])
    return mean_estimate(nearest, "nearest_distance")


def efficiency(t: float, t_dense: float, macs_fraction: float) -> float:
    """Share of the saved arithmetic that turns into saved time: (1 - t / t_dense) / (1 - macs_fraction).

    Args:
        t: time of the run under the method.
        t_dense: time of the dense run, timed interleaved with it; any unit, the same in both.
        macs_fraction: MACs of the run under the method / MACs of the dense run.

    Returns:
        0 = no gain, 1 = all of it, below 0 = slower than dense. A method that saves nothing (`macs_fraction` of 1 and
        above) scores 0 whatever its time.

    Raises:
        DiffratioError: times that are not positive or a negative fraction.
    """
    if not (0 < t < math.inf and 0 < t_dense < math.inf and 0 <= macs_fraction < math.inf):
        raise DiffratioError(
            f"efficiency needs positive times and a MACs fraction of at least 0, got t={t:g}, t_dense={t_dense:g}, "
            f"macs_fraction={macs_fraction:g}"
        )
    saved = 1.0 - macs_fraction
    # Below a millionth the quotient would be timing noise divided by rounding.
    return (1.0 - t / t_dense) / saved if saved > 1e-6 else 0.0


def _image_pair(metric: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 4 or a.shape != b.shape:
        raise DiffratioError(
            f"{metric} compares images of equal shape (n, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    require_samples(metric, len(a))
    return a.detach().double(), b.detach().to(a.device, torch.float64)


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
    ),
    "kid_lite0_vs_dense": Metric(
        "kid_lite0 minus the dense model's at the same noise, paired", "lower", KID_MINIMUM, _kid_vs_dense
    ),
    "fd_lite0": Metric(
        "Frechet distance to the reference, EfficientNet-Lite0 features, at this n only",
        "lower",
        FD_MINIMUM,
        lambda e: fd(e.reference, e.features),
    ),
    "psnr": Metric(
        "peak signal-to-noise ratio to the dense model's images at the same noise, dB",
        "higher",
        2,
        lambda e: psnr(e.images, e.dense.images) if e.dense else None,
    ),
    "ssim": Metric(
        "structural similarity to the dense model's images at the same noise",
        "higher",
        2,
        lambda e: ssim(e.images, e.dense.images) if e.dense else None,
    ),
    "feature_distance": Metric(
        "L2 distance to the dense model's features at the same noise",
        "lower",
        2,
        lambda e: feature_distance(e.features, e.dense.features) if e.dense else None,
    ),
    "excess_loss": Metric(
        "validation loss minus the dense model's at the same noise, paired", "lower", 2, _excess_loss
    ),
    "excess_loss_regions": Metric("excess_loss in each noise-level region", "lower", 2, _excess_loss_regions),
    "nearest_distance": Metric(
        "L2 distance to the nearest training image's features; small = memorised",
        "higher",
        2,
        lambda e: nearest_distance(e.train(), e.features) if e.train else None,
    ),
}
