"""Rows of data that do harm: each is named in one line, or read without any."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hostile import damaged, fuzzed
from hypothesis import strategies as st
from PIL import Image

from diffratio.data.images import ImageData
from diffratio.errors import DiffratioError, in_one_line
from diffratio.files import open_picture


@pytest.fixture(autouse=True, scope="module")
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets
    import datasets.config

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


def picture(kind: str = "PNG") -> bytes:
    """A grey picture of 8x8."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG whose header announces so many pixels a side."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def write(folder: Path, images: list[Any], **columns: Any) -> Path:
    """A parquet file of rows."""
    table = pa.table({"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), **columns})
    parquet.write_table(table, folder / "train.parquet")
    return folder / "train.parquet"


def read(source: Path, classes: int | None = 3) -> None:
    """Opens a source as training does, and reads every row."""
    data = ImageData(
        str(source), image_size=8, channels=1, num_classes=classes, validation_split=None, validation_fraction=0.25
    )
    data.setup()
    data.train_dataloader()
    data.held_out(1)


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Eight rows, the third of which is changed."""
    found: list[dict[str, Any]] = [{"bytes": picture(), "path": None} for _ in range(8)]
    found[3] |= changes
    return found


@fuzzed(10, 200, st.data())
def _rows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("rows")
    how = data.draw(st.sampled_from(["picture", "label", "file"]))
    labels: Any = pa.array([i % 3 for i in range(8)])
    images = rows()
    if how == "picture":
        kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"]))
        images = rows(bytes=data.draw(damaged(picture(kind))))
    elif how == "label":
        labels = data.draw(st.sampled_from(LABELS))
    path = write(folder, images, label=labels)
    if how == "file":
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        read(path)
    except DiffratioError as error:
        assert in_one_line(error).isprintable()


test_rows, test_many_rows = _rows

LABELS: list[Any] = [
    pa.array([0, 1, 2, 10**18, 0, 1, 2, 0]),
    pa.array([0, 1, 2, -1, 0, 1, 2, 0]),
    pa.array([0, 1, 2, 2**64 - 1, 0, 1, 2, 0], pa.uint64()),
    pa.array([0, 1, 2, None, 0, 1, 2, 0]),
    pa.array([0.0, 1, 2, float("nan"), 0, 1, 2, 0]),
    pa.array([0.0, 1, 2, None, 0, 1, 2, 0]),
    pa.array([[0]] * 8),
    pa.array([{"a": 1}] * 8),
    pa.array([b"\xff"] * 8),
    pa.array(["a", "b", "c", None, "a", "b", "c", "a"]),
    pa.array([True, False] * 4),
    pa.array([None] * 8),
    pa.Array.from_buffers(
        pa.string(), 8, [None, pa.py_buffer(np.arange(9, dtype=np.int32)), pa.py_buffer(b"ab\xffcabca")]
    ),
]


@pytest.mark.parametrize("number", range(len(LABELS)))
def test_labels(number: int, tmp_path: Path) -> None:
    path = write(tmp_path, rows(), label=LABELS[number])
    try:
        read(path)
    except DiffratioError as error:
        assert "label" in str(error) and "split 'train'" in str(error)
        assert "row 3" in str(error) or number in (4, 5, 6, 7, 8, 11, 12)
    else:
        assert number == 10


def test_a_row_names_no_picture_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    secret = tmp_path / "mine" / "secret.png"
    secret.write_bytes(picture())
    for path in (str(secret), "../mine/secret.png", "/dev/stdin", "nowhere.png", "a\x00b"):
        source = write(tmp_path / "theirs", rows(bytes=None, path=path), label=[i % 3 for i in range(8)])
        with pytest.raises(DiffratioError, match="row 3 of split 'train'"):
            read(source)


@pytest.mark.parametrize("side", [10**5, 11_000, 14_000])
def test_a_picture_of_any_size_is_not_made(side: int, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="row 3 of split 'train' cannot be decoded .*Decompression"):
        read(write(tmp_path, rows(bytes=bomb(side)), label=[i % 3 for i in range(8)]))


def test_formats_that_run_programs_are_no_pictures() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        open_picture(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"))


def test_a_caption_of_megabytes_is_named() -> None:
    from datasets import Dataset

    from diffratio.data.columns import captions_of

    table = Dataset.from_dict({"caption": ["a", "b\x00\x1b[2J", "c" * 10**7]})
    with pytest.raises(DiffratioError, match="row 2 of split 'train' has a caption of 10,000,000 characters"):
        captions_of(table, "train", "caption")
    assert captions_of(table.select([0, 1]), "train", "caption") == ["a", "b\x00\x1b[2J"]
