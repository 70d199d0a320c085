"""Balanced part of a labelled parquet file: how the embedded sets were made small enough to ship."""

from __future__ import annotations

import io
from pathlib import Path

from diffratio.errors import DiffratioError
from diffratio.files import atomic_file


def balanced_subset(
    path: str | Path, out: str | Path, *, per_class: int, seed: int = 0, label_column: str = "label"
) -> int:
    """Writes a seeded choice of equally many rows of every class to a new parquet file.

    Image bytes and the Hugging Face features in the schema stay as they are. Classes alternate in the file
    (0, 1, ..., C - 1, 0, 1, ...), so its first rows are balanced too. The smaller of plain and zstd is kept.

    Args:
        path: parquet file with an integer label column.
        out: parquet file to write.
        per_class: rows of each class.
        seed: the same seed chooses the same rows.
        label_column: name of the label column.

    Returns:
        Number of rows written: classes * per_class.

    Raises:
        DiffratioError: no such file or column, or a class with fewer rows than asked for.

    Example:
        >>> balanced_subset("all/test.parquet", "part/test.parquet", per_class=500)  # doctest: +SKIP
        5000
    """
    import numpy as np
    import pyarrow.parquet as parquet

    if not Path(path).is_file():
        raise DiffratioError(f"no parquet file {str(path)!r}; name an existing file")
    table = parquet.read_table(path)
    if label_column not in table.column_names:
        raise DiffratioError(
            f"{str(path)!r} has no column {label_column!r}; it has {', '.join(table.column_names)}: set label_column"
        )
    labels = table[label_column].to_numpy()
    classes, counts = np.unique(labels, return_counts=True)
    if per_class < 1 or not len(classes) or per_class > counts.min():
        raise DiffratioError(f"per_class must be 1 to {min(counts, default=0)} (the rarest class), got {per_class}")
    draw = np.random.default_rng(seed)
    chosen = np.stack([draw.permutation(np.flatnonzero(labels == c))[:per_class] for c in classes])  # (C, per_class)
    part = table.take(chosen.T.reshape(-1))
    packings: list[bytes] = []
    for compression, level in (("none", None), ("zstd", 19)):
        buffer = io.BytesIO()
        parquet.write_table(part, buffer, compression=compression, compression_level=level)
        packings.append(buffer.getvalue())
    with atomic_file(out) as temporary:
        temporary.write_bytes(min(packings, key=len))
    return part.num_rows
