"""Pictures with holes: what is known of a sample beside its condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.errors import DiffratioError


@dataclass(frozen=True)
class Known:
    """Pictures and where their holes are.

    Args:
        images: (B, C, H, W) in [-1, 1]; what lies in the hole is never shown to a model.
        masks: (B, 1, H, W), 1 in the hole and 0 where the picture is known.
    """

    images: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        images, masks = tuple(self.images.shape), tuple(self.masks.shape)
        if len(images) != 4 or len(masks) != 4 or masks != (images[0], 1, *images[2:]):
            raise DiffratioError(
                f"a mask of shape {masks} does not fit pictures of shape {images}: give one of (B, 1, H, W) for each "
                "picture (B, C, H, W), of the same height and width"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> Tensor:
        """What a model sees after the noised picture, (B, C + 1, H, W): the picture, 0 in the hole, and the mask."""
        return torch.cat([self.masked, self.masks.to(self.images.dtype)], dim=1)

    @property
    def masked(self) -> Tensor:
        """The pictures with 0, mid-grey, in the hole."""
        return torch.where(self.masks > 0.5, torch.zeros_like(self.images), self.images)

    def pasted(self, samples: Tensor) -> Tensor:
        """Samples (B, C, H, W) in the hole, the known pixels around it, bit for bit."""
        return torch.where(self.masks > 0.5, samples, self.images.to(samples.dtype))

    def take(self, indices: Sequence[int]) -> Known:
        """These pictures, counted on from the first after the last."""
        rows = torch.tensor([index % len(self) for index in indices], device=self.images.device)
        return Known(self.images[rows], self.masks[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Known:
        """The same elsewhere."""
        return Known(self.images.to(device, dtype), self.masks.to(device, dtype))
