"""Aspect-ratio buckets: which sizes there are, which one a picture goes to, and in which order their batches come."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffratio.data.split import ImageSplit
from diffratio.data.stream import Augmentation, Batch, Cursor, Shard, TrainStream
from diffratio.errors import DiffratioError, unknown
from diffratio.inpainting import Masks

Bucket = tuple[int, int]  # height and width in pixels

PRESETS = {256: 16, 512: 32, 1024: 64}  # side of the square of equal area -> what every side is a multiple of
_SMALLER, _LONGER = 0.9, 4.0  # least share of the square's area, largest quotient of the sides
_TURNS, _PASSES = 2, 3  # streams of draws; the plain order has none
_TIE = 1e-9  # quotients whose logarithms differ by less are equal


def read_buckets(value: object) -> tuple[Bucket, ...] | None:
    """Buckets of a config.

    Args:
        value: a list of [height, width] in pixels, a preset of `PRESETS`, or None for none.

    Raises:
        DiffratioError: none of these, an empty list, a pair twice, or a side that is no whole number of pixels.
    """
    if value is None:
        return None
    if isinstance(value, str | int) and not isinstance(value, bool):
        if str(value) not in map(str, PRESETS):
            raise unknown("data.buckets preset", str(value), [str(side) for side in PRESETS])
        return equal_area(int(value), PRESETS[int(value)])
    way = f"give pairs [[height, width], ...], a preset ({', '.join(map(str, PRESETS))}), or null"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DiffratioError(f"data.buckets is {value!r}; {way}")
    if not value:
        raise DiffratioError(f"data.buckets is empty; {way}")
    found: list[Bucket] = []
    for pair in value:
        sides = tuple(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else ()
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            raise DiffratioError(f"data.buckets holds {pair!r}, which is no [height, width] in whole pixels; {way}")
        if sides in found:
            raise DiffratioError(f"data.buckets holds {list(sides)} twice; leave one of them out")
        found.append((sides[0], sides[1]))
    return tuple(found)


def equal_area(side: int, step: int) -> tuple[Bucket, ...]:
    """Every size in multiples of `step` that has 0.9 to 1 of the area of a square, at most four times longer than wide.

    Args:
        side: of the square, in pixels.
        step: that both sides are multiples of.

    Returns:
        (height, width), from the widest to the tallest.

    Example:
        >>> equal_area(64, 16)
        ((32, 128), (48, 80), (64, 64), (80, 48), (128, 32))
    """
    area = side * side
    sides = range(step, int(side * math.sqrt(_LONGER)) + 1, step)
    pairs = [(height, width) for height in sides for width in sides if _SMALLER * area <= height * width <= area]
    return tuple(
        sorted((pair for pair in pairs if max(pair) <= _LONGER * min(pair)), key=lambda pair: pair[0] / pair[1])
    )


def nearest(sizes: NDArray[np.int64], buckets: Sequence[Bucket]) -> NDArray[np.int64]:
    """The bucket of nearest aspect ratio for each size; of several the one of nearest area, then the first.

    Args:
        sizes: height and width of the pictures, (n, 2).
        buckets: to choose from.

    Returns:
        Indices into `buckets`, (n,).
    """
    different, back = np.unique(sizes, axis=0, return_inverse=True)
    own, there = np.log(different.astype(np.float64)), np.log(np.asarray(buckets, dtype=np.float64))
    shape = np.abs((own[:, :1] - own[:, 1:]) - (there[:, 0] - there[:, 1]))  # (m, buckets)
    area = np.abs(own.sum(axis=1)[:, None] - there.sum(axis=1))
    area[shape > shape.min(axis=1, keepdims=True) + _TIE] = np.inf
    return area.argmin(axis=1)[back.reshape(-1)].astype(np.int64)


class BucketOrder:
    """The order of batches of one bucket each: a pure function of (seed, number of the batch).

    The pictures of a bucket come in an endless stream of its own: one permutation of all of them after the other, cut
    into batches without a rest. Epoch e brings every bucket up to the whole batches that e + 1 passes fill, its batches
    in an order drawn from (seed, e); what fills none is carried into the next epoch, so that no picture is lost or
    comes twice in a pass.

    Args:
        which: bucket of each picture, (n,).
        buckets: how many there are; some may be empty.
        batch_size: pictures in a batch.
        seed: of all draws.
    """

    def __init__(self, which: NDArray[np.int64], buckets: int, batch_size: int, seed: int) -> None:
        self.members = [np.flatnonzero(which == bucket) for bucket in range(buckets)]
        self.counts = np.array([len(rows) for rows in self.members], dtype=np.int64)
        self.batch_size, self.seed = batch_size, seed
        self._turns: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))
        self._passes: dict[tuple[int, int], NDArray[np.int64]] = {}

    def batch(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """Bucket and pictures, (batch_size,), of the batch of this number."""
        epoch = number * self.batch_size // int(self.counts.sum())
        while self._before(epoch + 1).sum() <= number:
            epoch += 1
        first, turns = self._before(epoch), self._turns_of(epoch)
        place = number - int(first.sum())
        bucket = int(turns[place])
        earlier = int(first[bucket]) + int((turns[:place] == bucket).sum())
        return bucket, self._pictures(bucket, earlier * self.batch_size)

    def _before(self, epoch: int) -> NDArray[np.int64]:
        """Batches of each bucket in all epochs before this one."""
        return epoch * self.counts // self.batch_size

    def _turns_of(self, epoch: int) -> NDArray[np.int64]:
        if self._turns[0] != epoch:
            each = self._before(epoch + 1) - self._before(epoch)
            turns = np.repeat(np.arange(len(each)), each)
            self._turns = epoch, np.random.default_rng([self.seed, epoch, 0, _TURNS]).permutation(turns)
        return self._turns[1]

    def _pictures(self, bucket: int, start: int) -> NDArray[np.int64]:
        """A batch's worth of a bucket's own stream."""
        passes, places = np.divmod(np.arange(start, start + self.batch_size), self.counts[bucket])
        rows = np.empty_like(places)
        for one in np.unique(passes):
            rows[passes == one] = self._pass(bucket, int(one))[places[passes == one]]
        return rows

    def _pass(self, bucket: int, number: int) -> NDArray[np.int64]:
        key = bucket, number
        if key not in self._passes:
            self._passes = {
                known: rows for known, rows in self._passes.items() if known[0] != bucket or known[1] == number - 1
            }
            draws = np.random.default_rng([self.seed, number, bucket, _PASSES])
            self._passes[key] = draws.permutation(self.members[bucket])
        return self._passes[key]


class BucketStream(TrainStream):
    """Infinite batches of one bucket each; see `TrainStream` and `BucketOrder`.

    The sample at a position depends on (seed, position, batch size) alone. Processes take whole batches, so that in one
    step they may work on different buckets.

    Args:
        split: the images.
        buckets: height and width that they are brought to.
        order: of the batches.
        shard: rank r of W takes batches n W + r.
        cursor: where to start.
        seed: of all draws.
        augmentation: what is drawn for each sample.
        masks: holes of the samples; None for models that fill none.
    """

    def __init__(
        self,
        split: ImageSplit,
        buckets: Sequence[Bucket],
        order: BucketOrder,
        shard: Shard,
        cursor: Cursor,
        seed: int,
        augmentation: Augmentation,
        masks: Masks | None = None,
    ) -> None:
        super().__init__(split, shard, cursor, seed, augmentation, masks)
        self.buckets, self.order = tuple(buckets), order

    def batch(self, start: int, count: int) -> Batch:
        """The samples at positions start, ..., start + count - 1, which must be one batch.

        Raises:
            DiffratioError: they are not, because the run was begun with another batch size.
        """
        if start % self.order.batch_size or count != self.order.batch_size:
            raise DiffratioError(
                f"the training stream stands at sample {start}, inside a batch of one bucket; with data.buckets set "
                f"data.batch_size={self.order.batch_size} to what the run was begun with"
            )
        return super().batch(start, count)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into the split of the samples at these positions, (B,) -> (B,)."""
        numbers, places = np.divmod(positions, self.order.batch_size)
        rows = np.empty_like(positions)
        for number in np.unique(numbers):
            rows[numbers == number] = self.order.batch(int(number))[1][places[numbers == number]]
        return rows

    def images(self, start: int, rows: NDArray[np.int64]) -> Tensor:
        """Pictures of a batch in its bucket's size."""
        bucket, _ = self.order.batch(start // self.order.batch_size)
        return self.split.covering(rows, self.buckets[bucket])
