"""One split of a data set: labels at hand, pixels decoded on demand or held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffratio.data.decode import Size, decode, size_of
from diffratio.errors import DiffratioError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ImageFormat:
    """What every picture is brought to: the side of a square, or height and width."""

    size: Size
    channels: int
    pad: bool


class ImageSplit:
    """Images and labels of one split.

    Args:
        name: name of the split in the source, for messages.
        table: the data set with an undecoded image column.
        image_column: name of that column.
        rows: which rows of `table` belong to the split, in its order, (n,) int64.
        labels: the class of each of them, (n,) int64.
        form: what pictures are brought to.
    """

    def __init__(
        self,
        name: str,
        table: Dataset,
        image_column: str,
        rows: NDArray[np.int64],
        labels: NDArray[np.int64],
        form: ImageFormat,
    ) -> None:
        self.name, self.form, self.rows, self.labels = name, form, rows, labels
        self._column, self._table = image_column, table.select_columns([image_column])
        self._held: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def reordered(self, order: NDArray[np.int64]) -> ImageSplit:
        """The same split with its n samples in another order, (n,) int64."""
        return ImageSplit(self.name, self._table, self._column, self.rows[order], self.labels[order], self.form)

    def pixels(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels of the samples at these indices, (B, C, H, W) uint8, in their order."""
        return self._held[indices] if self._held is not None else self._decoded(indices)

    def samples(self, indices: NDArray[np.int64]) -> Tensor:
        """The samples at these indices as a model is trained on them, (B, C, H, W) float32."""
        return to_unit_range(torch.from_numpy(self.pixels(indices)))

    def covering(self, indices: NDArray[np.int64], size: tuple[int, int]) -> Tensor:
        """The samples at these indices, scaled to cover a height and width and cropped at the centre.

        Returns:
            (B, C, H, W) float32 in [-1, 1].
        """
        pixels = self._decoded(indices, replace(self.form, size=size, pad=False))
        return to_unit_range(torch.from_numpy(pixels))

    def sizes(self) -> NDArray[np.int64]:
        """Height and width of every sample as it lies in the source, (n, 2), from the files' headers."""
        found = np.empty((len(self), 2), dtype=np.int64)
        for place, row, record in self._records(np.arange(len(self))):
            try:
                found[place] = size_of(record)
            except Exception as error:  # as in decoding
                raise self._damaged(row, record, error) from error
        return found

    def hold(self) -> None:
        """Decodes all samples once and keeps their pixels in memory."""
        if self._held is None:
            self._held = self._decoded(np.arange(len(self)))

    def _decoded(self, indices: NDArray[np.int64], form: ImageFormat | None = None) -> NDArray[np.uint8]:
        form = form or self.form
        height, width = (form.size, form.size) if isinstance(form.size, int) else form.size
        out = np.empty((len(indices), form.channels, height, width), dtype=np.uint8)
        for place, row, record in self._records(indices):
            try:
                out[place] = decode(record, size=form.size, channels=form.channels, pad=form.pad)
            except Exception as error:  # damaged files raise anything from OSError to SyntaxError
                raise self._damaged(row, record, error) from error
        return out

    def _records(self, indices: NDArray[np.int64]) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Place among the indices, row of the source and encoded picture."""
        for first in range(0, len(indices), 1000):  # bounds the encoded bytes held at once
            rows = self.rows[indices[first : first + 1000]]
            for place, (row, record) in enumerate(zip(rows, self._table[rows][self._column], strict=True), start=first):
                yield place, int(row), record

    def _damaged(self, row: int, record: dict[str, Any], error: Exception) -> DiffratioError:
        path = record.get("path") if record else None
        where = f" ({path})" if path else ""
        return DiffratioError(
            f"image in row {row} of split {self.name!r}{where} cannot be decoded "
            f"({type(error).__name__}: {error}); replace or remove that row or file"
        )


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]; 0 becomes exactly -1 and 255 exactly 1."""
    return pixels.float().div_(127.5).sub_(1.0)


def interleaved(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order in which classes take turns, so that any first n samples are as balanced as the split allows.

    Args:
        labels: (n,) int64.

    Returns:
        (n,) int64: indices; within a class the order stays.
    """
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.empty_like(labels)
    turn[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.lexsort((labels, turn))
