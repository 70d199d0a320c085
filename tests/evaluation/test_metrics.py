"""Metrics against closed forms, direct computations and resampling."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation import metrics
from diffratio.evaluation.statistics import group_order, jackknife_variance, mean_estimate


def normal(n: int, d: int = 16, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_kid_is_the_unbiased_polynomial_mmd() -> None:
    from torchmetrics.image.kid import poly_mmd

    real, fake = normal(150, seed=1), normal(150, shift=0.1, seed=2)
    assert metrics.kid(real, fake).value == pytest.approx(1000 * float(poly_mmd(real, fake)), abs=1e-6)


def test_kid_of_unequal_sets_matches_a_loop() -> None:
    real, fake = normal(11, d=3, seed=1), normal(7, d=3, seed=2)

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum(float(x[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)
    result = metrics.kid(real, fake)
    assert result.value == pytest.approx(1000 * expected)
    assert (result.n, result.n_real) == (7, 11)


def test_kid_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffratio.evaluation.metrics import distances

    real, fake = normal(90, seed=1), normal(70, shift=0.2, seed=2)
    whole = metrics.kid(real, fake)
    monkeypatch.setattr(distances, "_CHUNK", 32)
    chunked = metrics.kid(real, fake)
    assert chunked.value == pytest.approx(whole.value)
    assert chunked.stderr == pytest.approx(whole.stderr)


def test_kid_interval_is_the_jackknife_of_the_value() -> None:
    real, fake = normal(60, seed=1), normal(47, shift=0.2, seed=2)
    result = metrics.kid(real, fake, groups=5)
    variance = 0.0
    for which, features in (("real", real), ("fake", fake)):
        order, sizes = group_order(len(features), 5)
        without = []
        for g, group in enumerate(order.split(sizes)):
            assert len(group) == sizes[g]
            stay = torch.ones(len(features), dtype=torch.bool)
            stay[group] = False
            pair = (real[stay], fake) if which == "real" else (real, fake[stay])
            without.append(metrics.kid(*pair).value)
        variance += jackknife_variance(result.value, torch.tensor(without, dtype=torch.float64), sizes)
    assert result.stderr == pytest.approx(math.sqrt(variance))
    assert result.high - result.value == pytest.approx(2.7764 * result.stderr, rel=1e-4)  # t, 4 degrees of freedom


def test_kid_interval_covers_zero_between_equal_distributions() -> None:
    results = [metrics.kid(normal(200, seed=s), normal(200, seed=100 + s)) for s in range(20)]
    assert sum(result.low <= 0 <= result.high for result in results) >= 18
    assert min(result.value for result in results) < 0  # unbiased: it cannot be non-negative always


def test_kid_standard_error_matches_the_spread_under_a_shift() -> None:
    results = [metrics.kid(normal(200, seed=s), normal(200, shift=0.3, seed=100 + s)) for s in range(40)]
    values = torch.tensor([result.value for result in results])
    mean_stderr = sum(result.stderr for result in results) / len(results)
    assert 0.7 < mean_stderr / float(values.std()) < 1.4
    truth = float(values.mean())
    assert sum(result.low <= truth <= result.high for result in results) >= 34


def test_kid_grows_with_the_shift() -> None:
    real = normal(300, seed=1)
    values = [metrics.kid(real, normal(300, shift=shift, seed=2)).value for shift in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert values == sorted(values)
    assert len(set(values)) == 5


def test_paired_kid_difference_is_the_difference_and_its_interval_is_narrower() -> None:
    real, base, noise = normal(300, seed=1), normal(300, seed=2), normal(300, seed=3)
    a, b = base + 0.02 * noise, base + 0.05
    difference = metrics.kid_difference(real, a, b)
    kid_a, kid_b = metrics.kid(real, a), metrics.kid(real, b)
    assert difference.value == pytest.approx(kid_a.value - kid_b.value)
    assert difference.stderr < 0.7 * math.hypot(kid_a.stderr, kid_b.stderr)
    swapped = metrics.kid_difference(real, b, a)
    assert swapped.value == pytest.approx(-difference.value)
    assert swapped.stderr == pytest.approx(difference.stderr)


def test_paired_kid_difference_of_an_arm_with_itself_is_exactly_zero() -> None:
    real, fake = normal(50, seed=1), normal(50, seed=2)
    result = metrics.kid_difference(real, fake, fake)
    assert (result.value, result.stderr, result.low, result.high) == (0, 0, 0, 0)


def test_paired_kid_difference_covers_its_mean() -> None:
    results = []
    for s in range(40):
        base = normal(200, seed=100 + s)
        arms = base + 0.2, base + 0.3 + 0.1 * normal(200, seed=200 + s)
        results.append(metrics.kid_difference(normal(200, seed=s), *arms))
    truth = sum(result.value for result in results) / len(results)
    assert truth < 0
    assert sum(result.low <= truth <= result.high for result in results) >= 34


def test_jackknife_of_a_mean_is_the_classic_standard_error() -> None:
    values = normal(40, d=1).flatten()
    without = (values.sum() - values) / 39
    assert jackknife_variance(float(values.mean()), without, [1] * 40) == pytest.approx(float(values.var() / 40))


def test_jackknife_of_unequal_groups_estimates_the_variance_of_a_mean() -> None:
    sizes, estimates = [3, 3, 2, 2, 2], []
    for seed in range(400):
        values = normal(12, d=1, seed=seed).flatten()
        without = torch.stack([(values.sum() - part.sum()) / (12 - len(part)) for part in values.split(sizes)])
        estimates.append(jackknife_variance(float(values.mean()), without, sizes))
    assert sum(estimates) / len(estimates) == pytest.approx(1 / 12, rel=0.1)


def test_groups_cover_every_sample_once_and_mix_cycling_classes() -> None:
    order, sizes = group_order(203, 20)
    assert sorted(order.tolist()) == list(range(203))
    assert sum(sizes) == 203
    assert max(sizes) - min(sizes) <= 1
    assert all(len({int(i) % 10 for i in part}) > 2 for part in order.split(sizes))
    assert group_order(5, 20)[1] == [1] * 5


@pytest.mark.parametrize("n", [8, 100])  # below and above the width
def test_fd_matches_scipy(n: int) -> None:
    from scipy.linalg import sqrtm

    real, fake = normal(120, seed=1), normal(n, shift=0.3, seed=2) * 1.2
    s_real, s_fake = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
    means = real.numpy().mean(0) - fake.numpy().mean(0)
    # sqrtm of a singular product is unreliable: the symmetric form has the same trace and a real square root.
    root = sqrtm(s_real).real
    eigenvalues = np.linalg.eigvalsh(root @ s_fake @ root).clip(0)
    expected = means @ means + np.trace(s_real) + np.trace(s_fake) - 2 * np.sqrt(eigenvalues).sum()
    if n > 16:
        direct = means @ means + np.trace(s_real + s_fake - 2 * sqrtm(s_real @ s_fake).real)
        assert expected == pytest.approx(direct, rel=1e-6)
    result = metrics.fd(real, fake)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert (result.n, result.n_real) == (n, 120)


def test_fd_of_a_set_with_itself_is_zero_and_of_a_shift_its_square() -> None:
    real = normal(100, seed=1)
    assert metrics.fd(real, real).value == pytest.approx(0, abs=1e-9)
    assert metrics.fd(real, real + 0.5).value == pytest.approx(16 * 0.25)


def images(n: int = 3, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, 24, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_the_mean_over_samples() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    result = metrics.psnr(a, b)
    assert result.value == pytest.approx(30.0, abs=1e-4)  # 20 and 40 dB
    assert result.n == 2
    assert metrics.psnr(a, a).value == metrics.PSNR_CEILING


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_matches_scikit_image(channels: int) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    a = images(channels=channels)
    b = (a + 0.3 * images(channels=channels, seed=1)).clamp(-1, 1)
    pairs = [(x.double().numpy(), y.double().numpy()) for x, y in zip(a, b, strict=True)]
    expected = [skimage.peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in pairs]
    assert metrics.psnr(a, b).value == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_matches_scikit_image_on_zero_to_one(channels: int) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    a = images(channels=channels)
    b = (a + 0.3 * images(channels=channels, seed=1)).clamp(-1, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}

    def mirrored(x: Tensor) -> np.ndarray:  # scikit-image leaves out the border that torchmetrics mirrors
        return np.pad(x.numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect")

    expected = [
        skimage.structural_similarity(mirrored(x), mirrored(y), channel_axis=0, **options)
        for x, y in zip((a.double() + 1) / 2, (b.double() + 1) / 2, strict=True)
    ]
    assert metrics.ssim(a, b).value == pytest.approx(np.mean(expected), abs=1e-6)
    assert metrics.ssim(a, a).value == pytest.approx(1.0)


def test_feature_distances() -> None:
    a = normal(6, d=4)
    offset = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert metrics.feature_distance(a, a + offset).value == pytest.approx(5.0)
    assert metrics.nearest_distance(a, a[[4, 2]]).value == pytest.approx(0.0, abs=1e-6)
    expected = (a[:2, None] - a[None, 2:]).norm(dim=-1).min(dim=1).values.mean()
    assert metrics.nearest_distance(a[2:], a[:2]).value == pytest.approx(float(expected))


def test_paired_difference_matches_the_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    a, b = normal(30, d=1, seed=1).flatten(), normal(30, d=1, seed=2).flatten()
    reference = ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    result = metrics.paired_difference(a, b)
    assert (result.low, result.high) == pytest.approx((reference.low, reference.high))
    assert result.value == pytest.approx(float((a - b).mean()))
    assert result.n == 30


@pytest.mark.parametrize(
    ("t", "macs", "expected"),
    [(1.0, 0.8, 0.0), (0.8, 0.8, 1.0), (0.9, 0.8, 0.5), (1.1, 0.8, -0.5), (0.97, 1.0, 0.0), (1.3, 1.2, 0.0)],
)
def test_efficiency(t: float, macs: float, expected: float) -> None:
    assert metrics.efficiency(10 * t, 10.0, macs) == pytest.approx(expected)


def test_a_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(DiffratioError, match=r"pip install diffratio\[metrics\]"):
        mean_estimate(torch.tensor([1.0, 2.0]))


def test_registry_names_what_it_knows() -> None:
    assert metrics.check_metrics(["kid_lite0", "psnr"]) == ("kid_lite0", "psnr")
    with pytest.raises(DiffratioError, match="unknown metric 'kid_lite'.*did you mean kid_lite0"):
        metrics.check_metrics(["psnr", "kid_lite"])
    with pytest.raises(DiffratioError, match="kid_lite0 needs at least 4 samples, got 3"):
        metrics.require_samples("kid_lite0", 3)
    metrics.require_samples("kid_lite0", 4)


def test_minimum_of_each_feature_metric_is_enough() -> None:
    kid = metrics.METRICS["kid_lite0"].minimum
    for groups in (2, 20):
        assert math.isfinite(metrics.kid(normal(kid), normal(kid, seed=1), groups=groups).stderr)
    assert math.isfinite(metrics.fd(normal(2), normal(2, seed=1)).value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.kid(normal(3), normal(9)), "at least 4 samples in 'real', got 3"),
        (lambda: metrics.kid(normal(9), normal(9, d=8)), "equal d"),
        (lambda: metrics.kid(normal(9), normal(9), groups=1), "at least 2 groups"),
        (lambda: metrics.kid(normal(9), normal(9) / 0), "not finite"),
        (lambda: metrics.kid_difference(normal(9), normal(9), normal(8)), "got 9 and 8"),
        (lambda: metrics.fd(normal(1), normal(9)), "at least 2 samples"),
        (lambda: metrics.psnr(images(1), images(1)), "psnr needs at least 2 samples"),
        (lambda: metrics.psnr(images(2), images(3)), "equal shape"),
        (lambda: metrics.ssim(images()[..., :8], images()[..., :8]), "at least 11x11"),
        (lambda: metrics.feature_distance(normal(4), normal(5)), "one to one"),
        (lambda: metrics.paired_difference(torch.zeros(3), torch.zeros(4)), "one to one"),
        (lambda: mean_estimate(torch.tensor([1.0, math.nan]), "losses"), "losses: 1 of 2 are not finite"),
        (lambda: mean_estimate(torch.zeros(1), "losses"), "at least 2 samples"),
        (lambda: metrics.efficiency(0.0, 1.0, 0.5), "positive times"),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffratioError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
