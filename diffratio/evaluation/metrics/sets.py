"""Figures of sets of features beside KID and FD: precision and recall, CMMD, Inception score, CLIP score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.memo import remembered
from diffratio.evaluation.statistics import Estimate, feature_sets, mean_estimate, t_quantile

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3
_CHUNK = 1024


@dataclass(frozen=True)
class SetFigure:
    """A figure of two sets, without an interval. Only figures at equal `n` and `n_real` compare.

    Args:
        value: the figure.
        n: generated samples.
        n_real: reference samples.
    """

    value: float
    n: int
    n_real: int


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[SetFigure, SetFigure]:
    """Share of samples that lie among real images (precision) and share of real images among samples (recall).

    A point lies among a set where it is no further from some member than that member's `neighbours`-th nearest
    neighbour in its own set.

    Args:
        real: reference features (m, d).
        fake: features of the generated samples (n, d).
        neighbours: k of the k-th nearest neighbour; higher widens both sets.

    Returns:
        Precision and recall in [0, 1], higher is better. Both move with n and m.

    Raises:
        DiffratioError: fewer than `neighbours` + 1 samples in a set, different widths, or features that are not finite.

    Source:
        Kynkaanniemi et al., "Improved Precision and Recall Metric" (2019), equations 1 and 2.
    """
    if neighbours < 1:
        raise DiffratioError(
            f"precision_recall needs at least 1 neighbour, got {neighbours}; the default is {NEIGHBOURS}"
        )
    real, fake = feature_sets("precision_recall", neighbours + 1, real=real, fake=fake)
    radius_real = remembered(("radius", neighbours), (real,), lambda: _radii(real, neighbours))
    precision = _share_within(fake, real, radius_real)
    recall = _share_within(real, fake, _radii(fake, neighbours))
    return SetFigure(precision, len(fake), len(real)), SetFigure(recall, len(fake), len(real))


def cmmd(real: Tensor, fake: Tensor) -> SetFigure:
    """CMMD: squared MMD x 1000 with a Gaussian kernel of sigma 10 between L2-normalised CLIP embeddings.

    The biased estimator, diagonals included, which is the one that published figures use: zero for equal sets, and
    with a floor that falls as 1/n.

    Args:
        real: CLIP embeddings of reference images (m, d), of any length.
        fake: CLIP embeddings of the generated samples (n, d).

    Returns:
        Distance x 1000, lower is better.

    Raises:
        DiffratioError: fewer than 2 samples in a set, different widths, or features that are not finite.

    Source:
        Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (2024), section 4.
    """
    real, fake = feature_sets("cmmd", 2, real=real, fake=fake)
    real, fake = (torch.nn.functional.normalize(features, dim=1) for features in (real, fake))
    own = remembered("cmmd_real", (real,), lambda: _gaussian_mean(real, real))
    value = own + _gaussian_mean(fake, fake) - 2 * _gaussian_mean(real, fake)
    return SetFigure(CMMD_SCALE * value, len(fake), len(real))


def inception_score(logits: Tensor, splits: int = 10) -> Estimate:
    """exp(mean KL(p(y|x) || p(y))), averaged over equal splits of the samples.

    Args:
        logits: class logits of the generated samples (n, classes).
        splits: how many parts; the score falls with the samples in a part.

    Returns:
        Mean over splits with its t interval, higher is better; one split has no interval and gives one of zero width.

    Raises:
        DiffratioError: fewer than 2 samples or than splits, or logits that are not finite.

    Source:
        Salimans et al., "Improved Techniques for Training GANs" (2016), section 4.
    """
    if splits < 1:
        raise DiffratioError(f"inception_score needs at least 1 split, got {splits}; the default is 10")
    (logits,) = feature_sets("inception_score", max(2, splits), logits=logits)
    # shuffled: samples may come sorted by class, and a split must not be one class
    log_p = logits.log_softmax(dim=1)
    scores = []
    for part in torch.tensor_split(log_p[_shuffled(len(log_p), log_p.device)], splits):
        marginal = part.exp().mean(dim=0).log().clamp_min(-1e4)  # a class of probability 0 adds 0, not NaN
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp())
    score = torch.stack(scores)
    value = float(score.mean())
    stderr = float(score.std(unbiased=True)) / math.sqrt(splits) if splits > 1 else 0.0
    half = t_quantile(splits - 1) * stderr if splits > 1 else 0.0
    return Estimate(value, stderr, value - half, value + half, len(logits))


def clip_score(images: Tensor, texts: Tensor) -> Estimate:
    """Mean over samples of 100 max(cos(image, text), 0).

    Args:
        images: CLIP embeddings of the generated images (n, d), of any length.
        texts: CLIP embeddings of their prompts (n, d).

    Returns:
        Mean with its t interval, in [0, 100], higher is better.

    Raises:
        DiffratioError: different numbers or widths, fewer than 2 samples, or features that are not finite.

    Source:
        Hessel et al., "CLIPScore" (2021), equation 1, with the field's weight of 100.
    """
    images, texts = feature_sets("clip_score", 2, images=images, texts=texts)
    if len(images) != len(texts):
        raise DiffratioError(f"clip_score pairs images and prompts one to one, got {len(images)} and {len(texts)}")
    return mean_estimate(100 * torch.nn.functional.cosine_similarity(images, texts).clamp_min(0), "clip_score")


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance from each point to its k-th nearest other point, (n, d) -> (n,)."""
    # one more than k: the smallest distance of all is the point's own
    parts = [torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values for part in features.split(_CHUNK)]
    return torch.cat(parts)


def _share_within(points: Tensor, members: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(part, members) <= radii).any(dim=1) for part in points.split(_CHUNK)]
    return float(torch.cat(inside).double().mean())


def _gaussian_mean(x: Tensor, y: Tensor) -> float:
    """Mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs."""
    total = sum(float((-torch.cdist(part, y).square() / (2 * CMMD_SIGMA**2)).exp().sum()) for part in x.split(_CHUNK))
    return total / (len(x) * len(y))


def _shuffled(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
