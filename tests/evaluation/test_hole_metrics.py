"""Metrics inside the hole, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from diffratio.errors import DiffratioError
from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.metrics import measure
from diffratio.evaluation.metrics.holes import hole_feature_distance, hole_psnr, hole_ssim
from diffratio.evaluation.metrics.images import ssim
from diffratio.inpainting import Known

HOLES = ("hole_psnr", "hole_ssim", "hole_feature_distance")


def known(n: int = 3) -> Known:
    masks = torch.zeros(n, 1, 16, 16)
    masks[:, :, 4:12, 4:12] = 1
    return Known(torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, masks)


def test_psnr_counts_the_hole_alone() -> None:
    given = known()
    inside, outside = 0.5 * given.masks, 2.0 * (1 - given.masks)
    expected = 10 * math.log10(4 / 0.25)
    assert hole_psnr(given.images + inside, given).value == pytest.approx(expected, abs=1e-4)
    assert hole_psnr(given.images + inside + outside, given).value == pytest.approx(expected, abs=1e-4)
    assert hole_psnr(given.images + outside, given).value == 100.0


def test_ssim_is_the_mean_over_the_hole() -> None:
    given = known()
    noisy = given.images + 0.3 * torch.randn(given.images.shape, generator=torch.Generator().manual_seed(1))
    whole = Known(given.images, torch.ones_like(given.masks))
    assert hole_ssim(given.images, given).value == pytest.approx(1.0, abs=1e-6)
    # the window reaches over the border, where the whole picture's mean leaves the padding out
    assert hole_ssim(noisy, whole).value == pytest.approx(ssim(noisy, given.images).value, abs=0.05)
    corner = Known(given.images, torch.zeros_like(given.masks))
    corner.masks[:, :, 13:, 13:] = 1
    damaged = given.images.clone()
    damaged[:, :, :4, :4] = 0.9
    assert hole_ssim(damaged, corner).value == pytest.approx(1.0, abs=1e-6) and hole_ssim(noisy, corner).value < 0.99
    with pytest.raises(DiffratioError, match="hole_ssim needs images of at least 11x11, got 8x8"):
        hole_ssim(given.images[:, :, :8, :8], Known(given.images[:, :, :8, :8], given.masks[:, :, :8, :8]))


def test_features_pair_with_the_true_picture_in_turn() -> None:
    true = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    filled = torch.tensor([[3.0, 4.0], [3.0, 0.0], [0.0, 1.0]])
    assert hole_feature_distance(filled, true).value == pytest.approx((5 + 0 + 1) / 3)


def test_they_apply_to_inpainting_models_alone() -> None:
    given, features = known(), torch.randn(3, 4)
    with_holes = Evidence(given.images * 0.5, features, features, known=given)
    assert set(measure(HOLES, with_holes)) == set(HOLES)
    assert measure(HOLES, Evidence(given.images, features, features)) == {}


def test_a_mask_without_a_hole_is_an_error() -> None:
    given = known()
    with pytest.raises(DiffratioError, match="hole_psnr looks into the hole, and a mask has none"):
        hole_psnr(given.images, Known(given.images, torch.zeros_like(given.masks)))
