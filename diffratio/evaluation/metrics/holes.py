"""How near filled holes are to the true pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.metrics.images import PSNR_CEILING, image_pair
from diffratio.evaluation.metrics.nearest import feature_distance
from diffratio.evaluation.statistics import Estimate, mean_estimate
from diffratio.inpainting import Known

_WINDOW = 11  # of SSIM


def hole_psnr(images: Tensor, known: Known) -> Estimate:
    """Mean over samples of the peak signal-to-noise ratio inside the hole, in dB.

    Args:
        images: filled pictures in [-1, 1], (n, C, H, W).
        known: the true pictures and the masks.

    Returns:
        Mean with its t interval over samples; higher is closer, equal holes count as 100 dB.

    Raises:
        DiffratioError: different shapes, fewer than 2 samples, or a mask without a hole.
    """
    a, b = image_pair("hole_psnr", images, known.images)
    error = _inside((a - b).square(), known.masks, "hole_psnr")
    return mean_estimate((10 * torch.log10(4.0 / error)).clamp(max=PSNR_CEILING), "hole_psnr")  # data range 2


def hole_ssim(images: Tensor, known: Known) -> Estimate:
    """Mean over samples of the structural similarity, averaged over the pixels of the hole; see `ssim`.

    Args:
        images: filled pictures in [-1, 1], (n, C, H, W), sides of at least 11.
        known: the true pictures and the masks.

    Returns:
        Mean with its t interval over samples; 1 is equal.

    Raises:
        DiffratioError: different shapes, images smaller than the window, fewer than 2 samples, or no hole.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = image_pair("hole_ssim", images, known.images)
    if min(a.shape[-2:]) < _WINDOW:
        raise DiffratioError(
            f"hole_ssim needs images of at least {_WINDOW}x{_WINDOW}, got {a.shape[-2]}x{a.shape[-1]}; use hole_psnr"
        )
    found = structural_similarity_index_measure(
        a + 1, b + 1, data_range=2.0, reduction="none", return_full_image=True
    )  # shifted as in `ssim`
    assert isinstance(found, tuple)
    return mean_estimate(_inside(found[1], known.masks, "hole_ssim"), "hole_ssim")


def hole_feature_distance(features: Tensor, true: Tensor) -> Estimate:
    """Mean L2 distance of the filled pictures' features to those of the true pictures.

    Args:
        features: of the filled pictures, (n, d).
        true: of the true pictures, (m, d); picture i fills true picture i mod m.

    Returns:
        Mean with its t interval over samples; lower is closer.
    """
    rows = torch.arange(len(features), device=true.device) % len(true)
    return feature_distance(features, true[rows])


def _inside(values: Tensor, masks: Tensor, metric: str) -> Tensor:
    """Mean of (n, C, H, W) over the holes, (n,)."""
    counted = (masks.to(values) > 0.5).expand_as(values)
    pixels = counted.flatten(1).sum(1)
    if not bool((pixels > 0).all()):
        raise DiffratioError(f"{metric} looks into the hole, and a mask has none; give masks with a hole")
    return (values * counted).flatten(1).sum(1) / pixels
