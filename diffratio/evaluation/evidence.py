"""What a metric may look at, for one arm with one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.inpainting import Known


@dataclass(frozen=True)
class Sentences:
    """Embeddings of captions, of length 1.

    Args:
        samples: of the generated images' captions (n, c).
        reference: of the reference images' (m, c).
        train: of the training images' (t, c), in the order of their features.
    """

    samples: Tensor
    reference: Tensor
    train: Tensor


@dataclass(frozen=True)
class Evidence:
    """Everything that one arm gave with one seed; a metric takes what it needs and says None where that is missing.

    Args:
        images: generated images (n, C, H, W) in [-1, 1].
        features: their features (n, d).
        reference: features of real, held-out images (m, d).
        labels: class conditions of the generated images (n,).
        dense: the same for the dense model at the same noise and labels; None for the dense model itself.
        train: gives the features of training images (t, d) when asked; None where there are none.
        losses: validation loss of held-out image i in region j, (v, R); None where steps are what the arm changes.
        reference_losses: the same of the dense model that was fine-tuned alike, else of the dense model.
        data: name of the data set that the labels and the reference come from; tells which probe fits.
        extractor: id of what made all features; figures that are named by an extractor are refused for another one.
        reference_images: the real images behind `reference` (m, C, H, W) in [-1, 1], for optional extractors.
        prompts: captions of the generated images, for text-image scores.
        sentences: embeddings of the captions of samples, reference and training images; None without text.
        known: of inpainting models, the true picture of every generated image and its mask.
    """

    images: Tensor
    features: Tensor
    reference: Tensor
    labels: Tensor | None = None
    dense: Evidence | None = None
    train: Callable[[], Tensor] | None = None
    losses: Tensor | None = None
    reference_losses: Tensor | None = None
    data: str | None = None
    extractor: str | None = None
    reference_images: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    sentences: Sentences | None = None
    known: Known | None = None

    def __post_init__(self) -> None:
        other = self.dense.extractor if self.dense else None
        if other is not None and self.extractor is not None and other != self.extractor:
            raise DiffratioError(
                f"features of {self.extractor!r} do not pair with the dense model's of {other!r}; extract both alike"
            )
