"""The order of samples: a pure function of (seed, position), so that a run can stop and resume anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from diffratio.data.split import ImageSplit
from diffratio.inpainting import Masks

Batch = dict[str, Tensor]


@dataclass
class Cursor:
    """Global position at which the training stream starts when it is next iterated."""

    position: int = 0


@dataclass(frozen=True)
class Shard:
    """Which part of every global batch this process takes."""

    rank: int
    world: int
    batch_size: int

    @property
    def global_batch(self) -> int:
        """Samples that all processes take together."""
        return self.world * self.batch_size


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training samples: mirroring, and dropping the label to `null_label` (None: no labels)."""

    flip: bool
    label_dropout: float
    null_label: int | None


class TrainStream(IterableDataset[Batch]):
    """Infinite batches; the sample at a position does not depend on where the stream was started or how it is sharded.

    Epoch e is a permutation drawn from (seed, e); mirroring and label drop of a sample are drawn from (seed, position).

    Args:
        split: the images.
        shard: rank r of W takes positions [n W B + r B, n W B + (r + 1) B) of global batch n.
        cursor: where to start; read at every `iter`.
        seed: of all draws.
        augmentation: what is drawn for each sample.
        masks: holes of the samples; None for models that fill none.
    """

    def __init__(
        self,
        split: ImageSplit,
        shard: Shard,
        cursor: Cursor,
        seed: int,
        augmentation: Augmentation,
        masks: Masks | None = None,
    ) -> None:
        self.split, self.shard, self.cursor, self.seed, self.augmentation = split, shard, cursor, seed, augmentation
        self.masks = masks
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        start = self.cursor.position + self.shard.rank * self.shard.batch_size + worker * self.shard.global_batch
        while True:
            yield self.batch(start, self.shard.batch_size)
            start += workers * self.shard.global_batch

    def batch(self, start: int, count: int) -> Batch:
        """The samples at positions start, ..., start + count - 1."""
        positions = np.arange(start, start + count)
        rows = self.rows(positions)
        images = self.images(start, rows)  # (B, C, H, W)
        labels = torch.from_numpy(self.split.labels[rows])  # (B,)
        mirrored, dropped = uniforms(self.seed, start, count)[:, :2].T
        if self.augmentation.flip:
            which = torch.from_numpy(mirrored < 0.5)
            images[which] = images[which].flip(-1)
        if self.augmentation.null_label is not None:
            labels[torch.from_numpy(dropped < self.augmentation.label_dropout)] = self.augmentation.null_label
        holes = {} if self.masks is None else {"masks": self.masks.training(positions, images.shape[-2:])}
        return {"images": images, "labels": labels, "positions": torch.from_numpy(positions), **holes}

    def images(self, start: int, rows: NDArray[np.int64]) -> Tensor:
        """Pictures of a batch that begins at this position, (B, C, H, W) float32 in [-1, 1], not mirrored yet."""
        return self.split.samples(rows)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into the split of the samples at these positions, (B,) -> (B,)."""
        epochs, places = np.divmod(positions, len(self.split))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return rows

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
        return self._permutations[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permutations": {}}


class ValidationStream(IterableDataset[Batch]):
    """Every image once, in the split's order, labels kept; positions are indices into that order.

    All processes get equally many samples (an uneven end would stall collectives): at most W - 1 samples at the
    very end repeat the first ones, and their positions say so.
    """

    def __init__(self, split: ImageSplit, shard: Shard, masks: Masks | None = None) -> None:
        self.split, self.shard, self.masks = split, shard, masks

    def __len__(self) -> int:
        return -(-len(self.split) // self.shard.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        for index in range(worker, len(self), workers):
            first = index * self.shard.global_batch
            count = min(self.shard.batch_size, -(-(len(self.split) - first) // self.shard.world))
            start = first + self.shard.rank * count
            rows = np.arange(start, start + count) % len(self.split)
            yield {
                "images": self.split.samples(rows),
                "labels": torch.from_numpy(self.split.labels[rows]),
                "positions": torch.from_numpy(rows),
                **({} if self.masks is None else {"masks": self.masks.fixed(rows)}),
            }


def uniforms(seed: int, start: int, count: int) -> NDArray[np.float64]:
    """Four uniform numbers in [0, 1) for each position, a pure function of (seed, position).

    Philox is a counter-based generator: the counter is the position, and one block of it yields four numbers.

    Returns:
        (count, 4) float64.
    """
    raw = np.random.Philox(key=seed, counter=start).random_raw(4 * count)
    return np.ldexp((raw.reshape(count, 4) >> np.uint64(11)).astype(np.float64), -53)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
