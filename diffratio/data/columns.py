"""Reads the columns of a split, and says what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffratio.errors import DiffratioError, shortened

if TYPE_CHECKING:
    from datasets import Dataset

NO_CLASSES = "; or set num_classes to null for a model without classes"
NO_TEXT = "; or set text to null for a model without text"
_LONGEST = 1 << 16  # characters of a caption; encoders read a few hundred


def undecoded(table: Dataset, split: str, column: str) -> Dataset:
    """The table with its image column as encoded bytes or paths.

    Raises:
        DiffratioError: no such column, or it does not hold images.
    """
    from datasets import Image

    require(table.column_names, split, column, "image_column")
    feature = table.features[column]
    try:
        return table.cast_column(column, Image(decode=False))
    except Exception as error:  # arrow's error types differ with the column's type
        raise DiffratioError(
            f"column {column!r} of split {split!r} holds {feature}, not images; set image_column to one of "
            f"{', '.join(table.column_names)}"
        ) from error


def check_places(table: Dataset, split: str, column: str, root: Path | None) -> None:
    """Refuses rows that name a picture outside of their data's folder, which anyone's file could be.

    Args:
        table: with its image column undecoded.
        split: its name, for the message.
        column: of the images.
        root: folder of the data; None where a library downloaded it.

    Raises:
        DiffratioError: names the first such row.
    """
    import pyarrow.compute as compute

    if root is None:
        return
    values = table.with_format("arrow")[:][column].combine_chunks()
    without = compute.and_(compute.is_valid(values), compute.is_null(compute.struct_field(values, "bytes")))
    for row in np.flatnonzero(without.to_numpy(zero_copy_only=False)):
        check_place(values[int(row)].as_py(), int(row), split, root)


def check_place(record: Any, row: int, split: str, root: Path | None) -> None:
    """`check_places` of one row, its picture's `bytes` and `path`."""
    path = record.get("path") if isinstance(record, dict) and record.get("bytes") is None else None
    if root is None or path is None:
        return
    # as given, and as `datasets` names it, which follows a link
    places = [os.path.join(one, "") for one in (os.path.abspath(root), os.path.realpath(root))]
    if not os.path.normpath(path).startswith(tuple(places)):
        raise DiffratioError(
            f"row {row} of split {split!r} holds no picture but the name of one outside of {str(root)!r} "
            f"({shortened(path)}); store the picture in the row, or put it into that folder"
        )


def class_names(table: Dataset, split: str, column: str | None, num_classes: int) -> list[str]:
    """Names of the classes in a label column: its own, the sorted texts, or the numbers.

    Raises:
        DiffratioError: no label column, one that is not categorical, or more classes than `num_classes`.
    """
    from datasets import ClassLabel

    if column is None:
        raise DiffratioError(
            f"num_classes={num_classes} asks for a class-conditional model, but label_column is null; "
            f"set label_column to one of {', '.join(table.column_names)}, or num_classes to null"
        )
    require(table.column_names, split, column, "label_column", NO_CLASSES)
    feature = table.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        values = _values(table, column, split)
        if values.dtype == object:
            values = np.array([value for value in values if value is not None])
        if values.dtype.kind in "US":
            names = [str(name) for name in np.unique(values)]
        elif values.dtype.kind in "iub":
            highest = int(values.max(initial=0))
            if highest >= num_classes:  # before as many names are made
                raise DiffratioError(
                    f"column {column!r} has classes up to {highest} (row {int(values.argmax())} of split {split!r}), "
                    f"but num_classes={num_classes}; set num_classes to {highest + 1} or more"
                )
            names = [str(number) for number in range(highest + 1)]
        else:
            raise DiffratioError(
                f"column {column!r} of split {split!r} holds {feature}, not classes; set label_column to a column of "
                f"integers or names among {', '.join(table.column_names)}"
            )
    if len(names) > num_classes:
        raise DiffratioError(
            f"column {column!r} has {len(names)} classes ({names[0]} to {names[-1]}), but num_classes={num_classes}; "
            f"set num_classes to {len(names)} or more"
        )
    return names


def class_indices(table: Dataset, split: str, column: str, names: list[str]) -> NDArray[np.int64]:
    """Class of every row, (rows,) int64.

    Raises:
        DiffratioError: a row without a class, or with one that is not among `names`.
    """
    require(table.column_names, split, column, "label_column")
    values = _values(table, column, split)
    if values.dtype.kind in "US" or any(isinstance(value, str) for value in values):
        index = {name: number for number, name in enumerate(names)}
        labels = np.array([index.get(str(value), -1) for value in values], dtype=np.int64)
    elif values.dtype.kind in "iub":
        labels = np.clip(values, None, len(names)).astype(np.int64)  # a number of 64 bits would become a negative one
    elif all(value is None or isinstance(value, int) for value in values.tolist()):
        labels = np.array(
            [-1 if value is None else max(-1, min(value, len(names))) for value in values], dtype=np.int64
        )
    else:
        raise DiffratioError(
            f"column {column!r} of split {split!r} holds {table.features[column]}, not classes; set label_column to a "
            f"column of integers or names among {', '.join(table.column_names)}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        raise DiffratioError(
            f"row {row} of split {split!r} has no known class ({column}={values[row]!s}; {len(names)} are known); "
            f"{len(wrong)} such rows: remove or label them, or set num_classes to null"
        )
    return labels


def captions_of(table: Dataset, split: str, column: str) -> list[str]:
    """Caption of every row.

    Raises:
        DiffratioError: no such column, one that holds no text, or a row with no caption or an empty one.
    """
    require(table.column_names, split, column, "caption_column", NO_TEXT)
    values = _values(table, column, split).tolist()
    return [read_caption(value, row, split, column, table.column_names) for row, value in enumerate(values)]


def read_caption(value: Any, row: int, split: str, column: str, columns: Iterable[str]) -> str:
    """One caption.

    Raises:
        DiffratioError: none, an empty one or one without end; names the row.
    """
    if not isinstance(value, str) or not value.strip():
        raise DiffratioError(
            f"row {row} of split {split!r} has no caption ({column}={shortened(value)}); write one, remove the row, or "
            f"set caption_column to another of {', '.join(columns)}"
        )
    if len(value) > _LONGEST:
        raise DiffratioError(
            f"row {row} of split {split!r} has a caption of {len(value):,} characters ({value[:60]!r}...), "
            f"and at most {_LONGEST:,} are taken; cut it or remove the row"
        )
    return str(value)


def _values(table: Dataset, column: str, split: str) -> NDArray[np.generic]:
    try:
        return _read_values(table, column)
    except Exception as error:  # arrow's error types differ with the column's type
        raise DiffratioError(
            f"column {column!r} of split {split!r} cannot be read ({type(error).__name__}: {error}); mend its file"
        ) from error


def _read_values(table: Dataset, column: str) -> NDArray[np.generic]:
    values = table.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:  # stay as objects, so that a gap keeps its row
        return np.array(values.to_pylist(), dtype=object)
    array = np.asarray(values.to_numpy())
    return array.astype(str) if array.dtype == object and all(isinstance(value, str) for value in array) else array


def require(there: Sequence[str], split: str, column: str, argument: str, more: str = "") -> None:
    """Checks that a split has a column.

    Args:
        there: columns that it has.
        split: its name.
        column: what is looked for.
        argument: what sets it.
        more: what the message ends with, such as another way out.

    Raises:
        DiffratioError: it has none of that name.
    """
    if column not in there:
        raise DiffratioError(
            f"split {split!r} has no column {column!r}; it has {', '.join(there)}: set {argument} to one of them{more}"
        )
