"""What a comparison asks of the table: names, samples, the right features, and figures that records take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation import memo, metrics
from diffratio.evaluation.metrics import DEFAULT_METRICS, METRICS, Evidence, Nearest, distances, measure


def normal(n: int, shift: float = 0.0, seed: int = 0, d: int = 16) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def evidence(seed: int = 1, n: int = 12, **changes: object) -> Evidence:
    images = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    losses = normal(9, seed=seed + 50, d=4)
    made = Evidence(images, normal(n, seed=seed), normal(20, seed=9), losses=losses, train=lambda: normal(30, seed=8))
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_all_default_metrics_of_an_arm_are_plain_numbers() -> None:
    dense = evidence(seed=1)
    arm = evidence(seed=2, dense=dense, reference_losses=dense.losses)
    found = measure(DEFAULT_METRICS, arm)
    holes = {"hole_psnr", "hole_ssim", "hole_feature_distance"}  # of inpainting models
    assert set(found) == set(METRICS) - {"class_accuracy", "caption_retrieval"} - holes  # unnamed data, no text
    for value in found.values():
        for one in value if isinstance(value, list) else [value]:
            assert "value" in one and all(isinstance(number, int | float) for number in one.values())
    assert set(measure(DEFAULT_METRICS, dense)) == {"kid_lite0", "fd_lite0", "nearest_distance"}


def test_unknown_names_and_too_few_samples_are_clear_errors() -> None:
    with pytest.raises(DiffratioError, match="unknown metric 'fd_lite': did you mean fd_lite0"):
        measure(["fd_lite"], evidence())
    with pytest.raises(DiffratioError, match="unknown metric 'lpip'.*lpips"):
        metrics.check_metrics(["lpip"])
    with pytest.raises(DiffratioError, match="kid_lite0 needs at least 4 samples, got 3; raise n"):
        measure(DEFAULT_METRICS, evidence(n=3))


def test_features_of_another_extractor_are_refused() -> None:
    other = evidence(extractor="inception-v3@299")
    for name in ("kid_lite0", "kid_lite0_vs_dense", "fd_lite0"):
        with pytest.raises(
            DiffratioError, match=f"{name} stands for 'lite0' features, got those of 'inception-v3@299'"
        ):
            measure([name], other)
    assert "nearest_distance" in measure(["nearest_distance"], other)  # not named after its features
    with pytest.raises(
        DiffratioError, match="features of 'lite0-1@96' do not pair with the dense model's of 'lite0-1@64'"
    ):
        evidence(extractor="lite0-1@96", dense=evidence(extractor="lite0-1@64"))
    with pytest.raises(DiffratioError, match="equal d"):
        measure(["kid_lite0"], evidence(reference=normal(20, d=8)))


def test_nearest_distance_stands_beside_that_of_held_out_images() -> None:
    train, held_out, new = normal(200, seed=1), normal(100, seed=2), normal(100, seed=3)
    copies = train[:100] + 0.01 * normal(100, seed=4)
    fresh, copied = (metrics.nearest_distance(train, fake, held_out) for fake in (new, copies))
    assert isinstance(fresh, Nearest) and isinstance(copied, Nearest)
    alone = metrics.nearest_distance(train, held_out)
    assert (fresh.real, fresh.real_stderr, fresh.n_real, fresh.n_train) == (alone.value, alone.stderr, 100, 200)
    assert fresh.value == metrics.nearest_distance(train, new).value
    assert 0.9 < fresh.ratio < 1.1
    assert copied.ratio < 0.05


def test_the_reference_terms_are_computed_once_and_only_for_equal_content(monkeypatch: pytest.MonkeyPatch) -> None:
    memo.forget()
    kernels: list[bool] = []
    inner = distances._kernel_sums

    def counted(*args: object, skip_diagonal: bool = False) -> Tensor:
        kernels.append(skip_diagonal)
        return inner(*args, skip_diagonal=skip_diagonal)  # type: ignore[arg-type]

    monkeypatch.setattr(distances, "_kernel_sums", counted)
    real, fake = normal(40, seed=1), normal(30, seed=2)
    first = metrics.kid(real, fake)
    assert len(kernels) == 3
    assert metrics.kid(real.clone(), fake) == first and len(kernels) == 5  # equal content in another tensor
    assert metrics.kid(real, fake, groups=10).value == pytest.approx(first.value) and len(kernels) == 8
    real[0] += 1  # changed in place: the same object, other content
    changed = metrics.kid(real, fake)
    assert len(kernels) == 11
    memo.forget()
    assert metrics.kid(real, fake) == changed != first


def test_fd_is_the_same_with_and_without_memory() -> None:
    memo.forget()
    real, fake = normal(40, seed=1), normal(30, seed=2)
    first = metrics.fd(real, fake)
    assert metrics.fd(real, fake) == first
    assert metrics.fd(fake, real).value == pytest.approx(first.value)
    assert metrics.fd(real + 1, fake) != first


def test_memory_is_bounded() -> None:
    memo.forget()
    runs: list[int] = []
    for turn in range(2):
        for i in range(20):
            assert memo.remembered("x", (torch.tensor([i]),), lambda i=i: runs.append(i) or i) == i
        assert len(runs) == 20 * (turn + 1)  # 20 keys do not fit into 16 places
    assert memo.remembered("x", (torch.tensor([19]),), lambda: -1) == 19
    assert memo.remembered("y", (torch.tensor([19]),), lambda: -1) == -1
    assert memo.remembered("x", (torch.tensor([19.0]),), lambda: -2) == -2
    memo.forget()
