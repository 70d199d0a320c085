"""Estimates with intervals: the mean of samples, and the delete-a-group jackknife."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from diffratio.errors import DiffratioError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Args:
        value: the estimate.
        stderr: its standard error.
        low: lower end of the two-sided 95 % interval.
        high: upper end.
        n: samples that it rests on.
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int


def t_quantile(degrees: int) -> float:
    """Half-width of a 95 % interval in standard errors (Student's t; 1.96 for many degrees of freedom)."""
    try:
        from scipy.special import stdtrit
    except ImportError:
        raise DiffratioError("intervals need the package 'scipy'; pip install diffratio[metrics]") from None
    return float(stdtrit(degrees, 0.5 + LEVEL / 2))


def normal_quantile() -> float:
    """Half-width of a 95 % interval in standard errors, normal: 1.96."""
    return NormalDist().inv_cdf(0.5 + LEVEL / 2)


def share_estimate(right: int, n: int) -> Estimate:
    """Share of n samples with its Wilson interval (1927)."""
    share, z = right / n, normal_quantile()
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n)))
    return Estimate(share, math.sqrt(share * (1 - share) / n), low, high, n)


def mean_estimate(values: Tensor, what: str = "values") -> Estimate:
    """Mean of independent samples with its t interval.

    Args:
        values: one figure per sample, (n,), n >= 2.
        what: what they are, for the error.

    Returns:
        The mean, its standard error and interval.

    Raises:
        DiffratioError: fewer than two samples, a wrong shape, or values that are not finite.
    """
    if values.ndim != 1 or len(values) < 2:
        raise DiffratioError(f"{what}: need one figure for each of at least 2 samples, got shape {tuple(values.shape)}")
    values = values.detach().double()
    if not bool(torch.isfinite(values).all()):
        raise DiffratioError(f"{what}: {int((~torch.isfinite(values)).sum())} of {len(values)} are not finite")
    n = len(values)
    value, stderr = float(values.mean()), float(values.std(unbiased=True)) / math.sqrt(n)
    half = t_quantile(n - 1) * stderr
    return Estimate(value, stderr, value - half, value + half, n)


def paired_difference(a: Tensor, b: Tensor) -> Estimate:
    """Mean of a - b over samples that share noise and condition; the pairing removes what they have in common.

    Args:
        a: per-sample figures (losses, say) of one arm, (n,).
        b: the same samples under the other arm, (n,).

    Returns:
        Mean difference with its t interval; below zero means that `a` is lower.

    Raises:
        DiffratioError: different shapes, fewer than two samples, or values that are not finite.

    Example:
        >>> paired_difference(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5])).value
        0.5
    """
    if a.shape != b.shape:
        raise DiffratioError(f"paired samples must match one to one, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return mean_estimate(a.detach().double() - b.detach().double(), "paired difference")


def group_order(n: int, groups: int) -> tuple[Tensor, list[int]]:
    """Deals n samples into groups of nearly equal size, the same way for every set of n samples.

    Dealt at random (fixed seed): samples often come sorted by class or cycle through the classes, and a group must not
    be one class.

    Args:
        n: samples.
        groups: groups wanted; no more than n are made.

    Returns:
        An order (n,) that puts every group in one piece, and the group sizes in that order.
    """
    groups = min(groups, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order, [n // groups + (g < n % groups) for g in range(groups)]


def jackknife_variance(full: float, without: Tensor, sizes: list[int]) -> float:
    """Variance of an estimate from its values with each group left out.

    For equal groups this is (G - 1)/G sum_g (t_g - mean t)^2; unequal sizes are weighted as in Busing, Meijer and van
    der Leeden, "Delete-m jackknife for unequal m" (1999), equation 4.

    Args:
        full: the estimate from all samples.
        without: the estimate without group g, (G,).
        sizes: samples in each group.

    Returns:
        The variance of `full`.
    """
    left = without.double().cpu()
    size = torch.tensor(sizes, dtype=torch.float64)
    share = size.sum() / size
    combined = len(sizes) * full - ((1 - 1 / share) * left).sum()
    pseudo = share * full - (share - 1) * left
    return float(((pseudo - combined) ** 2 / (share - 1)).mean())


def feature_sets(what: str, minimum: int, **sets: Tensor) -> tuple[Tensor, ...]:
    """Checks sets of features against each other.

    Args:
        what: the metric, for the error.
        minimum: fewest samples in a set.
        sets: features (n, d) by name, equal d.

    Returns:
        The sets in float64, on the device of the first.

    Raises:
        DiffratioError: another shape, too few samples, or values that are not finite.
    """
    first = next(iter(sets.values()))
    for name, features in sets.items():
        if features.ndim != 2 or features.shape[1] != first.shape[-1]:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in sets.items())
            raise DiffratioError(f"{what} compares features of shape (n, d) with equal d, got {shapes}")
        if len(features) < minimum:
            raise DiffratioError(f"{what} needs at least {minimum} samples in {name!r}, got {len(features)}; raise n")
        if not bool(torch.isfinite(features).all()):
            raise DiffratioError(f"{what}: features {name!r} hold values that are not finite; check the images")
    return tuple(features.detach().to(first.device, torch.float64) for features in sets.values())
