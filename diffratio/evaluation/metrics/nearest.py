"""Distances between features of single samples: to the same sample of another model, to the nearest training image."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.memo import remembered
from diffratio.evaluation.statistics import Estimate, feature_sets, mean_estimate

_CHUNK = 1024


@dataclass(frozen=True)
class Nearest(Estimate):
    """Distance to the nearest training image, beside the same figure of images that were not trained on.

    Args:
        real: mean distance of held-out real images; samples far below it are copies of training images.
        real_stderr: its standard error.
        ratio: value / real; about 1 for samples as new as held-out images, towards 0 where they are memorised.
        n_real: held-out images.
        n_train: training images.
    """

    real: float
    real_stderr: float
    ratio: float
    n_real: int
    n_train: int


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


def nearest_distance(train: Tensor, fake: Tensor, real: Tensor | None = None) -> Estimate:
    """Mean Euclidean distance from a generated sample's features to those of the nearest training image.

    Args:
        train: features of the training images (m, d).
        fake: features of the generated samples (n, d).
        real: features of held-out real images (k, d), for the figure to read it against.

    Returns:
        Mean with its t interval over generated samples; with `real` a `Nearest`, which holds their figure too: far
        below it = memorised.

    Raises:
        DiffratioError: fewer than 2 samples, different widths, or features that are not finite.
    """
    if real is None:
        train, fake = feature_sets("nearest_distance", 2, train=train, fake=fake)
        return _nearest(train, fake)
    # the same for every arm: checked and computed once
    held_out = remembered("nearest_real", (train, real), lambda: nearest_distance(train, real))
    own = nearest_distance(train, fake)
    ratio = own.value / held_out.value if held_out.value else 1.0
    return Nearest(
        **asdict(own),
        real=held_out.value,
        real_stderr=held_out.stderr,
        ratio=ratio,
        n_real=held_out.n,
        n_train=len(train),
    )


def _nearest(train: Tensor, samples: Tensor) -> Estimate:
    nearest = torch.cat([torch.cdist(part, train).amin(dim=1) for part in samples.split(_CHUNK)])
    return mean_estimate(nearest, "nearest_distance")
