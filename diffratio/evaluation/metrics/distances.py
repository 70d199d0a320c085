"""Distances between two sets of features: KID with its jackknife interval, and the Frechet distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.memo import remembered
from diffratio.evaluation.statistics import Estimate, feature_sets, group_order, jackknife_variance, t_quantile

KID_SCALE = 1000.0
KID_MINIMUM = 4
"""Fewest samples: two must stay where one of two groups leaves."""
FD_MINIMUM = 2
_CHUNK = 1024


@dataclass(frozen=True)
class KID(Estimate):
    """Kernel distance x 1000, or a difference of two.

    Args:
        n_real: reference samples; `n` counts the generated ones.
    """

    n_real: int


@dataclass(frozen=True)
class FD:
    """Frechet distance. Its floor falls with n, so only figures at equal `n` and `n_real` compare.

    Args:
        value: the distance.
        n: generated samples.
        n_real: reference samples.
    """

    value: float
    n: int
    n_real: int


def kid(real: Tensor, fake: Tensor, *, groups: int = 20) -> KID:
    """Kernel distance of two sets of features: unbiased squared MMD x 1000 over the full sets.

    The kernel is (x.y / d + 1)^3. The interval comes from a delete-a-group jackknife over the real and the fake set in
    turn, their variances added (a bootstrap's duplicates would put the kernel's diagonal into the sums and bias it).
    Where the true distance is zero the statistic is degenerate and the interval is about 1.4 times too wide, never too
    narrow; the value itself may be below zero.

    Args:
        real: reference features (m, d).
        fake: features of the generated samples (n, d).
        groups: jackknife groups in each set; fewer samples than groups give one group a sample.

    Returns:
        Distance x 1000, its standard error and 95 % interval; lower is better.

    Raises:
        DiffratioError: fewer than 4 samples in a set, different widths, or features that are not finite.

    Source:
        Binkowski et al., "Demystifying MMD GANs" (2018), section 4; Gretton et al. (2012), equation 3.
    """
    real, fake = feature_sets("kid", KID_MINIMUM, real=real, fake=fake)
    _check_groups(groups)
    real, m = _grouped(real, groups)
    fake, n = _grouped(fake, groups)
    # every arm meets the same reference
    rr_sums = remembered(("kid", tuple(m)), (real,), lambda: _kernel_sums(real, real, m, m, skip_diagonal=True))
    rr, rr_left = _within(rr_sums, m)
    ff, ff_left = _within(_kernel_sums(fake, fake, n, n, skip_diagonal=True), n)
    rf, rf_left_real, rf_left_fake = _between(_kernel_sums(real, fake, m, n), m, n)
    return _kid(rr + ff - 2 * rf, rr_left + ff - 2 * rf_left_real, m, rr + ff_left - 2 * rf_left_fake, n)


def kid_difference(real: Tensor, fake_a: Tensor, fake_b: Tensor, *, groups: int = 20) -> KID:
    """Paired difference kid(a) - kid(b) of two arms.

    Sample i of both arms shares noise and condition, so the jackknife leaves the same samples out of both; the
    reference set's own term cancels.

    Args:
        real: reference features (m, d).
        fake_a: features of one arm (n, d).
        fake_b: features of the other arm (n, d), same order.
        groups: as in `kid`.

    Returns:
        Difference x 1000; below zero means that `a` is better.

    Raises:
        DiffratioError: as `kid`, or the arms differ in n.
    """
    real, a, b = feature_sets("kid", KID_MINIMUM, real=real, fake_a=fake_a, fake_b=fake_b)
    _check_groups(groups)
    if len(a) != len(b):
        raise DiffratioError(f"paired arms need equal samples, got {len(a)} and {len(b)}; generate both with equal n")
    real, m = _grouped(real, groups)
    a, n = _grouped(a, groups)
    b, _ = _grouped(b, groups)
    aa, aa_left = _within(_kernel_sums(a, a, n, n, skip_diagonal=True), n)
    bb, bb_left = _within(_kernel_sums(b, b, n, n, skip_diagonal=True), n)
    # One pass with the difference of the two cross sums: everything downstream is linear in them.
    cross = _kernel_sums(real, a, m, n) - _kernel_sums(real, b, m, n)
    rf, rf_left_real, rf_left_fake = _between(cross, m, n)
    return _kid(aa - bb - 2 * rf, aa - bb - 2 * rf_left_real, m, aa_left - bb_left - 2 * rf_left_fake, n)


def fd(real: Tensor, fake: Tensor) -> FD:
    """Frechet distance |mu_r - mu_f|^2 + tr(S_r + S_f - 2 (S_r S_f)^(1/2)) of Gaussians fitted to two sets of features.

    The last trace is the nuclear norm of R_r R_f^T, where R^T R = S comes from a QR decomposition of the centred
    features: no square root of a nearly singular product, and n below d is no special case.

    Args:
        real: reference features (m, d).
        fake: features of the generated samples (n, d).

    Returns:
        The distance with both set sizes; lower is better. With n <= d it mostly measures n.

    Raises:
        DiffratioError: fewer than 2 samples in a set, different widths, or features that are not finite.

    Source:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), equation 6.
    """
    real, fake = feature_sets("fd", FD_MINIMUM, real=real, fake=fake)
    mean_real, root_real = remembered("fd", (real,), lambda: _moments(real))
    mean_fake, root_fake = _moments(fake)
    cross = torch.linalg.svdvals(root_real @ root_fake.T).sum()
    value = (mean_real - mean_fake).square().sum() + root_real.square().sum() + root_fake.square().sum() - 2 * cross
    return FD(max(0.0, float(value)), len(fake), len(real))


def _check_groups(groups: int) -> None:
    if groups < 2:
        raise DiffratioError(f"the jackknife needs at least 2 groups, got {groups}; the default is 20")


def _grouped(features: Tensor, groups: int) -> tuple[Tensor, list[int]]:
    order, sizes = group_order(len(features), groups)
    return features[order.to(features.device)], sizes


def _kernel_sums(x: Tensor, y: Tensor, rows: list[int], columns: list[int], *, skip_diagonal: bool = False) -> Tensor:
    """Sums of the kernel (x.y / d + 1)^3 over each pair of groups: (m, d), (n, d) -> (G_rows, G_columns)."""
    width = x.shape[1]
    row_group = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(x.device)
    column_group = torch.repeat_interleave(torch.arange(len(columns)), torch.tensor(columns)).to(x.device)
    sums = x.new_zeros(len(rows), len(columns))
    for start in range(0, len(x), _CHUNK):
        kernel = ((x[start : start + _CHUNK] @ y.T) / width + 1) ** 3  # (chunk, n)
        if skip_diagonal:
            kernel.diagonal(start).zero_()
        by_column = kernel.new_zeros(len(kernel), len(columns)).index_add_(1, column_group, kernel)
        sums.index_add_(0, row_group[start : start + _CHUNK], by_column)
    return sums


def _within(sums: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean of a kernel over pairs i != j of one set, and the same without each group: -> (), (G,)."""
    size = torch.tensor(sizes, dtype=sums.dtype, device=sums.device)
    n, total = size.sum(), sums.sum()
    left = total - sums.sum(dim=0) - sums.sum(dim=1) + sums.diagonal()
    stay = n - size
    return total / (n * (n - 1)), left / (stay * (stay - 1))


def _between(sums: Tensor, rows: list[int], columns: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of a kernel over pairs of two sets; the same without each row group, without each column group."""
    row = torch.tensor(rows, dtype=sums.dtype, device=sums.device)
    column = torch.tensor(columns, dtype=sums.dtype, device=sums.device)
    m, n, total = row.sum(), column.sum(), sums.sum()
    without_rows = (total - sums.sum(dim=1)) / ((m - row) * n)
    without_columns = (total - sums.sum(dim=0)) / (m * (n - column))
    return total / (m * n), without_rows, without_columns


def _kid(full: Tensor, without_real: Tensor, m: list[int], without_fake: Tensor, n: list[int]) -> KID:
    value = float(full)
    variance = jackknife_variance(value, without_real, m) + jackknife_variance(value, without_fake, n)
    value, stderr = KID_SCALE * value, KID_SCALE * math.sqrt(variance)
    half = t_quantile(min(len(m), len(n)) - 1) * stderr
    return KID(value, stderr, value - half, value + half, n=sum(n), n_real=sum(m))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and R (min(n, d), d) with R^T R = the unbiased covariance."""
    mean = features.mean(dim=0)
    root = torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R
    return mean, root
