"""KID and FD on EfficientNet-Lite0 features as torchmetrics objects for a training loop, synchronised over ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from diffratio.errors import DiffratioError
from diffratio.evaluation.features import FeatureExtractor, Lite0Features
from diffratio.evaluation.metrics.distances import FD, FD_MINIMUM, KID, KID_MINIMUM, fd, kid


class _FeatureMetric(Metric):
    """Collects features of real and of generated images; subclasses turn the two sets into one figure.

    Args:
        extractor: what turns images into features; Lite0 by default, made when the first images come.
        reference: features of real images (m, d), equal on all ranks and not gathered; None expects them through
            `update(..., real=True)`.
        reset_real: whether `reset` forgets real features given through `update`.
        **kwargs: as every torchmetrics metric.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    _name: ClassVar[str]
    _minimum: ClassVar[int]

    real: list[Tensor]
    fake: list[Tensor]
    reference: Tensor | None

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        *,
        reference: Tensor | None = None,
        reset_real: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if reference is not None and reference.ndim != 2:
            raise DiffratioError(f"{self._name}: reference must be features (m, d), got {tuple(reference.shape)}")
        self._extractor, self._reset_real = extractor, reset_real
        # a buffer moves with the metric's device but is no state: a gather would count it once a rank
        self.register_buffer("reference", reference, persistent=False)
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, batch: Tensor, real: bool = False) -> None:
        """Adds a batch.

        Args:
            batch: images (n, C, H, W) in [-1, 1], or their features (n, d).
            real: whether these are real images.

        Raises:
            DiffratioError: neither images nor features, or real ones where a reference was given.
        """
        if real and self.reference is not None:
            raise DiffratioError(f"{self._name} has a reference already; update it with generated images alone")
        if batch.ndim not in (2, 4):
            raise DiffratioError(
                f"{self._name} takes images (n, C, H, W) or features (n, d), got shape {tuple(batch.shape)}"
            )
        features = self._extract(batch) if batch.ndim == 4 else batch.detach()
        (self.real if real else self.fake).append(features.to(self.device))

    def compute(self) -> Tensor:
        """The figure, a scalar float64 tensor.

        Raises:
            DiffratioError: fewer samples than it needs.
        """
        return torch.tensor(self._figure().value, dtype=torch.float64, device=self.device)

    def reset(self) -> None:
        """Forgets the samples, and the real ones unless `reset_real=False`."""
        kept = None if self._reset_real else list(self.real)  # torchmetrics clears the list in place
        super().reset()
        if kept is not None:
            self.real = kept

    def _figure(self) -> KID | FD:
        raise NotImplementedError

    def _sets(self) -> tuple[Tensor, Tensor]:
        for name, held in (("real", self.real), ("fake", self.fake)):
            count = sum(map(len, held)) if isinstance(held, list) else len(held)
            if count < self._minimum and not (name == "real" and self.reference is not None):
                raise DiffratioError(
                    f"{self._name} needs at least {self._minimum} {name} samples before compute, got {count}; "
                    f"call update(batch, real={name == 'real'})"
                )
        return self.reference if self.reference is not None else dim_zero_cat(self.real), dim_zero_cat(self.fake)

    def _extract(self, images: Tensor) -> Tensor:
        if self._extractor is None:
            self._extractor = Lite0Features(device=self.device)
        return self._extractor.extract(images)


class KIDLite0(_FeatureMetric):
    """KID x 1000 on EfficientNet-Lite0 features; see `distances.kid`.

    Example:
        >>> metric = KIDLite0(reference=torch.randn(50, 8))
        >>> metric.update(torch.randn(50, 8))
        >>> figure = metric.compute()
    """

    _name, _minimum = "kid_lite0", KID_MINIMUM

    def estimate(self) -> KID:
        """The figure with its interval; not synchronised over ranks, unlike `compute`."""
        return kid(*self._sets())

    def _figure(self) -> KID:
        return self.estimate()


class FDLite0(_FeatureMetric):
    """Frechet distance on EfficientNet-Lite0 features, for a fixed number of samples; see `distances.fd`."""

    _name, _minimum = "fd_lite0", FD_MINIMUM

    def _figure(self) -> FD:
        return fd(*self._sets())
