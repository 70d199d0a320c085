"""Pictures to be encoded, shard by shard: from a table that can start anywhere, or a stream that is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffratio.data.columns import (
    NO_CLASSES,
    NO_TEXT,
    captions_of,
    check_place,
    check_places,
    class_indices,
    class_names,
    read_caption,
    require,
    undecoded,
)
from diffratio.data.decode import decode
from diffratio.data.source import local_root, open_source, open_stream
from diffratio.errors import DiffratioError, kind_and_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_READ = 256  # rows read from a table at once


@dataclass(frozen=True)
class FeedSettings:
    """What is read, as in a data config."""

    source: str
    name: str
    image_size: int
    pad_to: bool
    num_classes: int | None
    captions: bool
    image_column: str
    label_column: str | None
    caption_column: str
    train_split: str
    validation_split: str | None


@dataclass(frozen=True)
class Row:
    """One sample, its picture still encoded."""

    number: int
    picture: dict[str, Any]
    label: int = 0
    caption: str = ""

    def pixels(self, split: str, size: int, pad: bool) -> NDArray[np.uint8]:
        """Pixels (3, size, size); raises DiffratioError for a damaged picture."""
        try:
            return decode(self.picture, size=size, channels=3, pad=pad)
        except Exception as error:  # damaged files raise anything from OSError to SyntaxError
            raise DiffratioError(
                f"image in row {self.number} of split {split!r} cannot be decoded ({type(error).__name__}: {error}); "
                "replace or remove that row or file"
            ) from error


class Feed:
    """One split.

    Args:
        split: its name.
        rows: how many; None of a stream, which says at its end.
        read: (first, last) -> rows of a table; of a stream `follow` is given instead.
        follow: an iterator over all rows of a stream.
    """

    def __init__(
        self,
        split: str,
        rows: int | None,
        read: Callable[[int, int], list[Row]] | None = None,
        follow: Callable[[], Iterator[Row]] | None = None,
    ) -> None:
        self.split, self.rows, self._read, self._follow = split, rows, read, follow

    def shards(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """Number and rows of every wanted shard of `size` rows, the last one shorter; others are not kept."""
        if self._follow is None:
            assert self._read is not None and self.rows is not None
            for number in range(-(-self.rows // size)):
                if wanted(number):
                    last = min(self.rows, (number + 1) * size)
                    firsts = range(number * size, last, _READ)
                    yield number, [row for one in firsts for row in self._read(one, min(one + _READ, last))]
            return
        rows: list[Row] = []
        number, count = 0, 0
        for row in self._follow():
            if wanted(number):
                rows.append(row)
            count += 1
            if count == size:
                if rows:
                    yield number, rows
                rows, count, number = [], 0, number + 1
        if rows:
            yield number, rows


def open_feeds(settings: FeedSettings, streaming: bool) -> tuple[list[Feed], list[str]]:
    """The splits of a source, and the names of its classes.

    Args:
        settings: what is read.
        streaming: whether the source is read from the front, without a copy of it on this machine.

    Raises:
        DiffratioError: source, split or column not found, or classes that do not fit.
    """
    if streaming:
        return _streams(settings, open_stream(settings.source))
    tables = open_source(settings.source)
    names = _split_names(settings, list(tables))
    first = undecoded(tables[names[0]], names[0], settings.image_column)
    known: list[str] = []
    if settings.num_classes is not None:
        known = class_names(first, names[0], settings.label_column, settings.num_classes)
    feeds = []
    for name in names:
        table = undecoded(tables[name], name, settings.image_column)
        check_places(table, name, settings.image_column, local_root(settings.source))
        if len(table) == 0:
            raise DiffratioError(
                f"split {name!r} of data source {settings.source!r} is empty; add rows or leave it out"
            )
        labels, captions = np.zeros(len(table), dtype=np.int64), None
        if settings.num_classes is not None and settings.label_column is not None:
            labels = class_indices(table, name, settings.label_column, known)
        if settings.captions:
            captions = captions_of(table, name, settings.caption_column)
        feeds.append(Feed(name, len(table), _reader(table, settings.image_column, labels, captions)))
    return feeds, known


def _split_names(settings: FeedSettings, there: Sequence[str]) -> list[str]:
    if settings.train_split not in there:
        raise DiffratioError(
            f"data source {settings.source!r} has no split {settings.train_split!r}; it has {', '.join(there)}: "
            "set data.train_split to one"
        )
    held = settings.validation_split
    if held is None or held not in there or held == settings.train_split:
        return [settings.train_split]
    return [settings.train_split, held]


def _reader(
    table: Dataset, column: str, labels: NDArray[np.int64], captions: Sequence[str] | None
) -> Callable[[int, int], list[Row]]:
    pictures = table.select_columns([column])

    def read(first: int, last: int) -> list[Row]:
        found = pictures[first:last][column]
        return [
            Row(first + i, picture, int(labels[first + i]), "" if captions is None else captions[first + i])
            for i, picture in enumerate(found)
        ]

    return read


def _streams(settings: FeedSettings, splits: Mapping[str, IterableDataset]) -> tuple[list[Feed], list[str]]:
    names = _split_names(settings, list(splits))
    for name in names:
        _check_columns(settings, name, splits[name])
    known: list[str] = []
    if settings.num_classes is not None:
        from datasets import ClassLabel

        feature = (splits[names[0]].features or {}).get(settings.label_column or "")
        known = list(feature.names) if isinstance(feature, ClassLabel) else []
        known = known or [str(number) for number in range(settings.num_classes)]
        if len(known) > settings.num_classes:
            raise DiffratioError(
                f"column {settings.label_column!r} has {len(known)} classes, but data.num_classes="
                f"{settings.num_classes}; set data.num_classes to {len(known)} or more"
            )
    return [Feed(name, None, follow=_follower(settings, name, splits[name], len(known))) for name in names], known


def _check_columns(settings: FeedSettings, split: str, stream: IterableDataset) -> None:
    there = list(stream.column_names or next(_rows(settings, split, stream), {}))
    require(there, split, settings.image_column, "image_column")
    if settings.num_classes is not None:
        require(there, split, settings.label_column or "", "label_column", NO_CLASSES)
    if settings.captions:
        require(there, split, settings.caption_column, "caption_column", NO_TEXT)


def _rows(settings: FeedSettings, split: str, stream: IterableDataset) -> Iterator[dict[str, Any]]:
    try:
        yield from stream
    except Exception as error:  # the reader's many error types all mean: this file cannot be read
        raise DiffratioError(
            f"split {split!r} of data source {settings.source!r} cannot be streamed ({kind_and_line(error, 200)}); "
            "mend the damaged file, or remove an empty one"
        ) from error


def _follower(settings: FeedSettings, split: str, stream: IterableDataset, classes: int) -> Callable[[], Iterator[Row]]:
    def follow() -> Iterator[Row]:
        from datasets import Image

        try:
            undecoded = stream.cast_column(settings.image_column, Image(decode=False))
        except Exception as error:  # arrow's error types differ with the column's type
            raise DiffratioError(f"split {split!r} has no images in {settings.image_column!r} ({error})") from error
        root = local_root(settings.source)
        for number, values in enumerate(_rows(settings, split, undecoded)):
            label, caption = 0, ""
            if settings.num_classes is not None:
                found = values.get(settings.label_column or "")
                if type(found) is not int or not 0 <= found < classes:
                    raise DiffratioError(
                        f"row {number} of split {split!r} has no class of 0 to {classes - 1} "
                        f"({settings.label_column}={found!r}); a stream's classes must be numbers"
                    )
                label = found
            if settings.captions:
                column = settings.caption_column
                caption = read_caption(values.get(column), number, split, column, values)
            check_place(values.get(settings.image_column), number, split, root)
            yield Row(number, values[settings.image_column], label, caption)

    return follow
