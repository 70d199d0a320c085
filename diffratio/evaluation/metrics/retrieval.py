"""caption_retrieval: whether samples still obey their caption, by a linear map from features to text."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.statistics import Estimate, feature_sets, share_estimate

POOL, TOP = 100, 10  # the own caption among so many; found when it is among the first so many
_DECAYS = (1.0, 10.0, 100.0, 1e3, 1e4)


@dataclass(frozen=True)
class Retrieval(Estimate):
    """Share of samples whose own caption ranks among the first `top` of `pool`, with a Wilson interval.

    Args:
        real: the same share for held-out real pictures: what perfect samples would reach.
        chance: `top` / `pool`.
        pool: captions that are ranked, the own one included.
        top: ranks that count.
    """

    real: float
    chance: float
    pool: int
    top: int


def caption_retrieval(
    features: Tensor,
    sentences: Tensor,
    reference: Tensor,
    reference_sentences: Tensor,
    train: Tensor,
    train_sentences: Tensor,
) -> Retrieval:
    """Share of samples whose caption can be told from their features.

    A ridge regression from features to caption embeddings is fitted on training pictures, its decay chosen on a fifth
    of them. Each sample's own caption is ranked by cosine among others drawn from the held-out captions.

    Args:
        features: of the samples (n, d).
        sentences: embeddings of their captions (n, c), of length 1.
        reference: features of held-out real pictures (m, d).
        reference_sentences: embeddings of their captions (m, c).
        train: features of training pictures (t, d).
        train_sentences: embeddings of their captions (t, c).

    Returns:
        Share in [0, 1], higher is better.

    Raises:
        DiffratioError: shapes that do not fit.

    Source:
        R-precision of text-to-image evaluation (Xu et al., AttnGAN, 2018), with a pool of held-out captions.
    """
    (features, reference, train) = feature_sets(
        "caption_retrieval", 2, samples=features, reference=reference, train=train
    )
    pairs = ((features, sentences), (reference, reference_sentences), (train, train_sentences))
    if any(len(one) != len(text) for one, text in pairs):
        raise DiffratioError(
            "caption_retrieval needs a caption for each picture, got "
            + ", ".join(f"{len(text)} for {len(one)}" for one, text in pairs)
        )
    mean, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    texts = train_sentences.double()
    middle = texts.mean(0)
    x, y = (train - mean) / scale, texts - middle
    chosen = torch.arange(len(x)) % 5 == 0
    if 0 < int(chosen.sum()) < len(x) - 1:
        decays = {
            decay: float((x[chosen] @ _ridge(x[~chosen], y[~chosen], decay) - y[chosen]).square().mean())
            for decay in _DECAYS
        }
        weight = _ridge(x, y, min(decays, key=decays.__getitem__))
    else:
        weight = _ridge(x, y, _DECAYS[-1])
    pool = reference_sentences.double() - middle
    others = min(POOL, len(torch.unique(reference_sentences, dim=0))) - 1
    top = max(1, round(TOP * (others + 1) / POOL))

    def found(of: Tensor, own: Tensor) -> int:
        guessed = torch.nn.functional.normalize((of - mean) / scale @ weight, dim=1)
        own = torch.nn.functional.normalize(own.double() - middle, dim=1)
        count = 0
        generator = torch.Generator().manual_seed(0)
        candidates = torch.nn.functional.normalize(pool, dim=1)
        for guess, text in zip(guessed, own, strict=True):
            strangers = candidates[candidates @ text < 1 - 1e-6]  # another picture may have the same caption
            drawn = strangers[torch.randperm(len(strangers), generator=generator)[:others]]
            count += int((drawn @ guess >= text @ guess).sum() < top)
        return count

    real = found(reference, reference_sentences) / len(reference)
    share = share_estimate(found(features, sentences), len(features))
    return Retrieval(**asdict(share), real=real, chance=top / (others + 1), pool=others + 1, top=top)


def applicable_retrieval(evidence: Evidence) -> Retrieval | None:
    """`caption_retrieval` of text-conditional samples; None without captions or training pictures."""
    texts = evidence.sentences
    if texts is None or evidence.train is None:
        return None
    return caption_retrieval(
        evidence.features, texts.samples, evidence.reference, texts.reference, evidence.train(), texts.train
    )


def _ridge(x: Tensor, y: Tensor, decay: float) -> Tensor:
    """(t, d), (t, c) -> (d, c)."""
    gram = x.T @ x + decay * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, x.T @ y)
