"""KID on real pictures: zero between halves of them, and more the more they are blurred or noised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffratio.data.images import ImageData
from diffratio.evaluation.features import Lite0Features
from diffratio.evaluation.metrics import fd, kid

pytest.importorskip("efficientnet_lite_pytorch")
EACH = 120


@pytest.fixture(scope="module")
def images() -> Tensor:
    return ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10).held_out(4 * EACH)[0]


@pytest.fixture(scope="module")
def extract(images: Tensor) -> Callable[[Tensor], Tensor]:
    return Lite0Features(resize=64).extract


@pytest.fixture(scope="module")
def features(images: Tensor, extract: Callable[[Tensor], Tensor]) -> Tensor:
    return extract(images)


def test_real_against_real_covers_zero(features: Tensor) -> None:
    covered, values = 0, []
    for seed in range(20):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        result = kid(features[order[: 2 * EACH]], features[order[2 * EACH :]])
        covered += result.low <= 0 <= result.high
        values.append(result.value)
    assert covered >= 18
    assert min(values) < 0 < max(values)  # unbiased: on both sides of zero


def blurred(images: Tensor, strength: float) -> Tensor:
    reach = torch.arange(-6, 7).double()
    kernel = (-reach.square() / (2 * strength**2)).exp()
    kernel = (kernel / kernel.sum()).to(images.dtype)
    padded = torch.nn.functional.pad(images, (6, 6, 6, 6), value=-1.0)
    rows = torch.nn.functional.conv2d(padded, kernel.view(1, 1, 13, 1))
    return torch.nn.functional.conv2d(rows, kernel.view(1, 1, 1, 13)).clamp(-1, 1)


def noised(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + strength * noise).clamp(-1, 1)


@pytest.mark.parametrize(
    ("spoil", "strengths"), [(blurred, (0.5, 1.0, 2.0)), (noised, (0.05, 0.15, 0.4))], ids=["blurred", "noised"]
)
def test_kid_grows_with_what_is_done_to_pictures(
    images: Tensor,
    features: Tensor,
    extract: Callable[[Tensor], Tensor],
    spoil: Callable[[Tensor, float], Tensor],
    strengths: tuple[float, ...],
) -> None:
    real, copies = features[EACH:], images[:EACH]
    sets = [features[:EACH], *(extract(spoil(copies, strength)) for strength in strengths)]
    kids = [kid(real, one) for one in sets]
    assert [one.value for one in kids] == sorted({one.value for one in kids})
    assert kids[0].low <= 0 <= kids[0].high < kids[-1].low
    distances = [fd(real, one).value for one in sets]
    assert distances == sorted(set(distances))
