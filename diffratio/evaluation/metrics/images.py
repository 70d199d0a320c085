"""Distances between the images of two models at the same noise: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.statistics import Estimate, mean_estimate

PSNR_CEILING = 100.0
"""dB given to equal images, whose PSNR is infinite; float32 rounding of images in [-1, 1] lies above it."""
PAIRED_MINIMUM = 2
"""Fewest samples of a mean with an interval."""


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

    a, b = image_pair("psnr", a, b)
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

    a, b = image_pair("ssim", a, b)
    if min(a.shape[-2:]) < 11:
        raise DiffratioError(f"ssim needs images of at least 11x11, got {a.shape[-2]}x{a.shape[-1]}; use psnr instead")
    each = structural_similarity_index_measure(a + 1, b + 1, data_range=2.0, reduction="none")
    assert isinstance(each, Tensor)
    return mean_estimate(each, "ssim")


def image_pair(metric: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Checks two sets of images against each other and returns them in float64.

    Raises:
        DiffratioError: different shapes, or fewer than 2 samples.
    """
    if a.ndim != 4 or a.shape != b.shape:
        raise DiffratioError(
            f"{metric} compares images of equal shape (n, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if len(a) < PAIRED_MINIMUM:
        raise DiffratioError(f"{metric} needs at least {PAIRED_MINIMUM} samples, got {len(a)}; raise n")
    return a.detach().double(), b.detach().to(a.device, torch.float64)
