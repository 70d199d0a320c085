"""The data module: labelled or unlabelled images, for training, validation and reference."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from diffratio.conditions import Captions, Classes, Conditions, cached_captions
from diffratio.data.buckets import BucketOrder, BucketStream, nearest, read_buckets
from diffratio.data.columns import captions_of, check_places, class_indices, class_names, undecoded
from diffratio.data.registry import embedded_sets
from diffratio.data.source import local_root, open_source
from diffratio.data.split import ImageFormat, ImageSplit, interleaved
from diffratio.data.stream import Augmentation, Batch, Cursor, Shard, TrainStream, ValidationStream
from diffratio.errors import DiffratioError, shortened
from diffratio.inpainting import InpaintSettings, Known, Masks
from diffratio.plain import MOST, switches, whole

if TYPE_CHECKING:
    from datasets import Dataset

# Up to here a split is decoded once and held as uint8 (at most 2.3 GiB); beyond, pictures are decoded as they are read.
_HELD_IMAGES, _HELD_SIZE = 200_000, 64
_WORKERS, _SEEDS, _CLASSES = 256, 2**32 - 1, 10**6  # beyond them stands a slip of the hand


class ImageData(LightningDataModule):
    """Images in [-1, 1] with class labels or captions, from any source, in an order that can be resumed exactly.

    A batch is a dict of `images` float32 (B, C, H, W) in [-1, 1], `labels` int64 (B,) and `positions` int64 (B,).
    A label is the number of a class or of a caption; `conditions` turns it into the transformer's arguments. The label
    `conditions.null` is the null label; without classes and captions all labels are 0. With `inpaint` there are `masks`
    float32 (B, 1, H, W), 1 in the hole. The training stream is infinite:
    train by steps (`max_steps`, an integer `val_check_interval`). Its sample at a position depends on (seed, position)
    alone, not on batch size, number of processes or workers.

    Args:
        source: embedded set, folder of images, parquet file or folder, or hub id; see `open_source`.
        name: what reports call the set; the source by default.
        image_size: side of the square images, in pixels; with buckets of those held out, for reference and in a
            budget alone.
        buckets: sizes to train on, [height, width] in pixels, or 256, 512 or 1024 for all of about that square's area.
            A picture goes to the nearest aspect ratio, is scaled to cover it and cropped at the centre; every batch is
            of one bucket. None trains on squares.
        channels: 1 (grey) or 3 (RGB).
        num_classes: classes of the model (the set may have fewer); None for a model without classes.
        image_column: column that holds the images.
        label_column: column that holds the classes; not read where `num_classes` is None.
        caption_column: column that holds the captions; not read where `text` is None.
        text: `encoder` and `tokens` of the captions, of a text-conditional model; None for one without text.
        train_split: split to train on.
        validation_split: held-out split. None, or a source with one split only: a part of the training split.
        validation_fraction: size of that part, in (0, 1).
        pad_to: centre images that fit into the square on black (-1) instead of enlarging them. Larger images are scaled
            down and cropped at the centre.
        flip: mirror half of the training images.
        label_dropout: fraction of training labels replaced by the null label (for classifier-free guidance).
        batch_size: samples of one process in one batch.
        num_workers: loader processes; 0 is fastest for sets that are held in memory (<= 64 px, < 200,000 images).
        seed: of order, flips, label drops, masks and of the held-out part.
        inpaint: masks of the images, for models that fill holes; None makes none.

    Attributes:
        position: samples of the training stream consumed so far, by all processes together. `train_dataloader()` starts
            here. Lightning's training loop moves it on and checkpoints it; in a loop of your own, call `set_position`.

    Raises:
        DiffratioError: an argument out of range; the source's own faults are raised on `setup`.

    Example:
        >>> data = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10)
        >>> images, labels = data.held_out(20)
        >>> images.shape, labels.bincount().tolist()
        (torch.Size([20, 1, 32, 32]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int,
        channels: int,
        num_classes: int | None,
        name: str | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str = "caption",
        text: Mapping[str, Any] | None = None,
        train_split: str = "train",
        validation_split: str | None = "test",
        validation_fraction: float = 0.05,
        pad_to: bool = True,
        flip: bool = True,
        label_dropout: float = 0.1,
        batch_size: int = 96,
        num_workers: int = 0,
        seed: int = 0,
        inpaint: InpaintSettings | None = None,
        buckets: str | int | Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        whole("image_size", image_size, 1, MOST)
        whole("batch_size", batch_size, 1, MOST)
        whole("num_workers", num_workers, 0, _WORKERS)
        whole("seed", seed, 0, _SEEDS)
        if num_classes is not None:
            whole("num_classes", num_classes, 1, _CLASSES, "; null for a model without classes")
        if text is not None:
            if not isinstance(text, Mapping):
                raise DiffratioError(f"text is {text!r}; it takes {{encoder: minilm, tokens: 24}}, or null")
            if num_classes is not None:
                raise DiffratioError(f"num_classes={num_classes} and text={dict(text)}: a model takes one of the two")
            if set(text) != {"encoder", "tokens"}:
                raise DiffratioError(f"text has the keys encoder and tokens, got {', '.join(map(str, text)) or 'none'}")
            if not isinstance(text["encoder"], str):
                raise DiffratioError(f"text.encoder must be a name or a folder, got {text['encoder']!r}")
        switches({"flip": flip, "pad_to": pad_to}, "", ["flip", "pad_to"])
        places = {"train_split": train_split, "validation_split": validation_split, "name": name, "source": source}
        places |= {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
        for argument, value in places.items():
            if not isinstance(value, str | None):
                raise DiffratioError(f"{argument}={shortened(value)}: it takes text")
        if isinstance(channels, bool) or channels not in (1, 3):
            raise DiffratioError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
        if not 0.0 <= label_dropout <= 1.0:
            raise DiffratioError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        if not 0.0 < validation_fraction < 1.0:
            raise DiffratioError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
        self.source, self.name = source, name or source
        self.num_classes, self.seed = num_classes, seed
        self.image_column, self.label_column = image_column, label_column
        self.train_split, self.validation_split = train_split, validation_split
        self.validation_fraction, self.batch_size, self.num_workers = validation_fraction, batch_size, num_workers
        self._image_size, self._form = image_size, ImageFormat(image_size, channels, pad_to)
        self.caption_column, self.text = caption_column, text
        self._flip, self._label_dropout = flip, label_dropout
        self._cursor = Cursor()
        self.masks = None if inpaint is None else Masks(inpaint, image_size, seed)
        self.buckets = read_buckets(buckets)
        if self.buckets is not None and self.masks is not None and not self.masks.drawn:
            raise DiffratioError(
                f"inpaint.mask={self.masks.settings.mask!r} is of one size and data.buckets has "
                f"{len(self.buckets)}; draw masks (inpaint.mask=mixed), or set data.buckets=null"
            )
        self._order: BucketOrder | None = None
        self._splits: tuple[ImageSplit, ImageSplit] | None = None
        self._class_names: list[str] = []
        self._captions: Captions | None = None

    @property
    def conditions(self) -> Conditions:
        """What labels stand for."""
        self.setup()
        return self._captions if self._captions is not None else Classes(self.num_classes)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels; empty where the model has no classes."""
        self.setup()
        return list(self._class_names)

    @property
    def position(self) -> int:
        """Samples of the training stream consumed so far, by all processes together."""
        return self._cursor.position

    @position.setter
    def position(self, position: int) -> None:
        self.set_position(position)

    def set_position(self, position: int) -> None:
        """Makes `train_dataloader()` start after this many samples (all processes together)."""
        whole("position", position, 0)
        self._cursor.position = int(position)

    def state_dict(self) -> dict[str, Any]:
        """The position; everything else of the stream follows from the arguments."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.set_position(state_dict["position"])

    def prepare_data(self) -> None:
        """Downloads a hub set, and encodes captions, once per machine."""
        if self._splits is None and self.text is not None:
            self.setup()
        elif self._splits is None and self.source not in embedded_sets():
            open_source(self.source)

    def setup(self, stage: str | None = None) -> None:
        """Opens the source and checks its splits, columns and classes; decodes no image.

        Raises:
            DiffratioError: source, split or column not found, an empty split, or classes that do not fit.
        """
        if self._splits is not None:
            return
        tables = open_source(self.source)
        train = self._table(tables, self.train_split, "train_split")
        validation = None
        if self.validation_split is not None and (self.validation_split in tables or len(tables) > 1):
            validation = self._table(tables, self.validation_split, "validation_split")
        if self.num_classes is not None:
            self._class_names = class_names(train, self.train_split, self.label_column, self.num_classes)
        if self.text is not None:
            self._captions = self._encoded([train, *([] if validation is None else [validation])])
        whole = self._split(self.train_split, train)
        if validation is None:
            kept, held = self._partition(len(train))
            self._splits = whole.reordered(kept), self._in_turn(whole.reordered(held))
        else:
            assert self.validation_split is not None
            self._splits = whole, self._in_turn(self._split(self.validation_split, validation))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Infinite loader of this process's part of the training stream, from `position` on."""
        return self._loader(self._stream(self._held(0) if self.buckets is None else self._pair()[0]))

    def train_rows(self, positions: Sequence[int]) -> list[int]:
        """Rows of the source's training split that stand at these positions of the training stream."""
        split = self._pair()[0]
        return [int(row) for row in split.rows[self._stream(split).rows(np.asarray(positions, dtype=np.int64))]]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Loader of all held-out images, classes taking turns, labels kept; positions are indices into that order."""
        return self._loader(ValidationStream(self._held(1), self._shard(), self.masks))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Moves `position` past a batch that is about to be trained on (not past those that were only prefetched)."""
        if self.trainer is not None and self.trainer.training:
            shard = self._shard()
            first = int(batch["positions"][0]) - shard.rank * shard.batch_size
            self.set_position(first + shard.global_batch)
        return batch

    def held_out(self, n: int) -> tuple[Tensor, Tensor]:
        """The first n held-out images, classes taking turns, so that any n is balanced.

        Args:
            n: at most the size of the held-out split.

        Returns:
            images (n, C, H, W) float32 in [-1, 1] and labels (n,) int64.
        """
        return _first(self._pair()[1], n)

    def held_out_known(self, n: int) -> Known | None:
        """The first n held-out images with their fixed masks; None without `inpaint`."""
        return None if self.masks is None else Known(self.held_out(n)[0], self.masks.fixed(range(n)))

    def reference(self, n: int) -> tuple[Tensor, Tensor]:
        """n training images, neither mirrored nor shuffled, classes taking turns; see `held_out`."""
        return _first(self._in_turn(self._pair()[0]), n)

    @property
    def held_out_size(self) -> int:
        """Number of held-out images."""
        return len(self._pair()[1])

    def _pair(self) -> tuple[ImageSplit, ImageSplit]:
        self.setup()
        assert self._splits is not None
        return self._splits

    def _stream(self, split: ImageSplit) -> TrainStream:
        """This process's part of the training stream of a split."""
        rest = self._shard(), self._cursor, self.seed, self._augmentation(), self.masks
        if self.buckets is None:
            return TrainStream(split, *rest)
        if self._order is None:
            which = nearest(split.sizes(), self.buckets)
            self._order = BucketOrder(which, len(self.buckets), self.batch_size, self.seed)
        return BucketStream(split, self.buckets, self._order, *rest)

    def _held(self, which: int) -> ImageSplit:
        split = self._pair()[which]
        if len(split) < _HELD_IMAGES and self._image_size <= _HELD_SIZE:
            split.hold()
        return split

    def _table(self, tables: dict[str, Dataset], split: str, argument: str) -> Dataset:
        if split not in tables:
            raise DiffratioError(
                f"data source {self.source!r} has no split {split!r}; it has {', '.join(tables)}: set {argument} to one"
                + (", or to null to hold out a part of the training split" if argument == "validation_split" else "")
            )
        if len(tables[split]) == 0:
            raise DiffratioError(
                f"split {split!r} of data source {self.source!r} is empty; set {argument} to a split with images"
            )
        table = undecoded(tables[split], split, self.image_column)
        check_places(table, split, self.image_column, local_root(self.source))
        return table

    def _split(self, name: str, table: Dataset) -> ImageSplit:
        labels = np.zeros(len(table), dtype=np.int64)
        if self._captions is not None:
            labels = np.array(self._captions.numbers(captions_of(table, name, self.caption_column)), dtype=np.int64)
        if self.num_classes is not None and self.label_column is not None:
            labels = class_indices(table, name, self.label_column, self._class_names)
        return ImageSplit(name, table, self.image_column, np.arange(len(table)), labels, self._form)

    def _encoded(self, tables: Sequence[Dataset]) -> Captions:
        """All captions of the splits, each once, in the order in which they come."""
        assert self.text is not None
        names = (self.train_split, self.validation_split or self.train_split)
        found = [captions_of(table, name, self.caption_column) for table, name in zip(tables, names, strict=False)]
        texts = [text for text in dict.fromkeys(text for part in found for text in part) if text]
        return cached_captions(texts, self.text["encoder"], self.text["tokens"], _say)

    def _augmentation(self) -> Augmentation:
        null = self.num_classes if self._captions is None else self._captions.null
        return Augmentation(self._flip, self._label_dropout, null)

    def _in_turn(self, split: ImageSplit) -> ImageSplit:
        """Held-out samples so that any first n stand for all: classes taking turns, captions shuffled."""
        if self._captions is None:
            return split.reordered(interleaved(split.labels))
        return split.reordered(np.random.default_rng([0, len(split)]).permutation(len(split)))

    def _partition(self, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        held = max(1, round(self.validation_fraction * rows))
        if held >= rows:
            raise DiffratioError(
                f"split {self.train_split!r} has {rows} images: too few to hold out a part of "
                f"{self.validation_fraction:g}; add images or lower validation_fraction"
            )
        order = np.random.default_rng([self.seed, 1]).permutation(rows)
        return np.sort(order[held:]), np.sort(order[:held])

    def _shard(self) -> Shard:
        if self.trainer is None:
            return Shard(0, 1, self.batch_size)
        return Shard(self.trainer.global_rank, self.trainer.world_size, self.batch_size)

    def _loader(self, stream: TrainStream | ValidationStream) -> DataLoader[Batch]:
        # The stream makes whole batches: `batch_size=None` turns torch's own collation off.
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_apart,
        )


def _apart(worker: int) -> None:
    """Takes a worker out of the job's group: torchrun's SIGTERM is for the main process, which saves and ends it."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first(split: ImageSplit, n: int) -> tuple[Tensor, Tensor]:
    if not 1 <= n <= len(split):
        raise DiffratioError(f"split {split.name!r} can give 1 to {len(split)} images, asked for {n}; ask for fewer")
    indices = np.arange(n)
    return split.samples(indices), torch.from_numpy(split.labels[indices])
