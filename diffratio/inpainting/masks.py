"""Masks by number: drawn or read, each a function of (seed, number) alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.files import in_mode, open_picture
from diffratio.inpainting.holes import SHAPES, hole
from diffratio.inpainting.settings import InpaintSettings

_TRAINING, _FIXED = 1, 2  # streams of draws; the data's own is 0


class Masks:
    """Masks of square pictures, or where they are drawn of any.

    Args:
        settings: how they are made.
        size: side of the pictures in pixels.
        seed: of the draws.

    Raises:
        DiffratioError: `settings.mask` is no shape and no PNG, or a PNG is of another size or has no hole.

    Example:
        >>> masks = Masks(InpaintSettings("boxes", (0.25, 0.25)), size=8, seed=0)
        >>> masks.fixed([0, 1]).shape, float(masks.fixed([5]).sum())
        (torch.Size([2, 1, 8, 8]), 16.0)
    """

    def __init__(self, settings: InpaintSettings, size: int, seed: int) -> None:
        self.settings, self.size, self.seed = settings, size, seed
        drawn = settings.mask in SHAPES
        self._files = None if drawn else [read_mask(path, size) for path in mask_files(settings.mask)]

    @property
    def drawn(self) -> bool:
        """Whether masks are drawn, in any size, and not read from files."""
        return self._files is None

    def training(self, positions: Iterable[int], size: Sequence[int] | None = None) -> Tensor:
        """Masks of these positions of the training stream, some of them all hole.

        Args:
            positions: of the samples.
            size: height and width, where masks are drawn; None takes the square's.

        Returns:
            (B, 1, H, W) float32, 1 = hole.
        """
        height, width = (self.size, self.size) if size is None else size
        return self._stack([self._training(int(position), (height, width)) for position in positions])

    def fixed(self, indices: Iterable[int]) -> Tensor:
        """Masks of these held-out pictures; files in turn; (B, 1, H, W) float32, 1 = hole."""
        return self._stack([self._fixed(int(index)) for index in indices])

    def _training(self, position: int, size: tuple[int, int]) -> NDArray[np.bool_]:
        generator = self._generator(_TRAINING, position)
        if generator.uniform() < self.settings.image_dropout:
            return np.ones(size, dtype=bool)
        if self._files is not None:
            return self._files[int(generator.integers(len(self._files)))]
        return hole(self.settings.mask, size, self.settings.share, generator)

    def _fixed(self, index: int) -> NDArray[np.bool_]:
        if self._files is not None:
            return self._files[index % len(self._files)]
        return hole(self.settings.mask, self.size, self.settings.share, self._generator(_FIXED, index))

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        # counter-based: the number stands in the upper words of the counter, so that no two numbers share a draw
        return np.random.Generator(np.random.Philox(key=self.seed + (stream << 64), counter=number << 64))

    def _stack(self, masks: list[NDArray[np.bool_]]) -> Tensor:
        stacked = np.stack(masks) if masks else np.empty((0, self.size, self.size))
        return torch.from_numpy(stacked.astype(np.float32))[:, None]


def mask_files(place: str) -> list[Path]:
    """The PNG, or those of a folder in the order of their names.

    Raises:
        DiffratioError: neither, or a folder without any.
    """
    path = Path(place)
    if path.is_file() and path.suffix.lower() == ".png":
        return [path]
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.suffix.lower() == ".png")
        if found:
            return found
        raise DiffratioError(f"mask {place!r} is a folder without PNGs; give one with masks, white where the hole is")
    raise DiffratioError(f"mask {place!r} is no PNG and no folder of them, and none of {', '.join(SHAPES)}; give one")


def read_mask(path: Path, size: int) -> NDArray[np.bool_]:
    """A PNG as a mask, True in the hole.

    Raises:
        DiffratioError: no picture, of another size than the pictures, or without a white pixel.
    """
    try:
        with open_picture(path) as picture:
            grey = np.asarray(in_mode(picture, "L"))
    except Exception as error:  # damaged files raise anything from OSError to SyntaxError
        raise DiffratioError(f"mask {str(path)!r} cannot be read ({error}); give a PNG, white = hole") from None
    height, width = grey.shape
    if (height, width) != (size, size):
        raise DiffratioError(
            f"mask {str(path)!r} is {height}x{width} and the pictures are {size}x{size}; scale it to their size"
        )
    if not (grey >= 128).any():
        raise DiffratioError(f"mask {str(path)!r} has no hole: it is black all over; paint the hole white")
    return np.asarray(grey >= 128)
