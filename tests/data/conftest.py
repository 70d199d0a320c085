"""Small data sets on disk; the pixel value says which picture it is."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, config
from PIL import Image as Pictures


@pytest.fixture(autouse=True)
def _quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _png(value: int, width: int = 8, height: int = 8, mode: str = "L") -> bytes:
    """A picture of one colour with a white column at the left edge, so that mirroring shows."""
    pixels = np.full((height, width), value, dtype=np.uint8)
    pixels[:, 0] = 255
    buffer = io.BytesIO()
    Pictures.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Draws and encodes one picture: `png(value, width, height, mode)`."""
    return _png


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes `set/{split}.parquet` of n pictures (value = row) with labels row % classes; bytes can be replaced."""

    def write(split: str = "train", n: int = 40, classes: int = 4, broken: dict[int, Any] | None = None) -> Path:
        encoded = [(broken or {}).get(i, _png(i)) for i in range(n)]
        rows = {
            "image": [None if picture is None else {"bytes": picture, "path": None} for picture in encoded],
            "label": [i % classes for i in range(n)],
        }
        features = Features({"image": Image(), "label": ClassLabel(names=[f"class {c}" for c in range(classes)])})
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        return folder

    return write


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Eight RGB pictures in each of the sub-folders cat and dog."""
    for offset, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "pets" / name / f"{i}.png").write_bytes(_png(100 * offset + i, mode="RGB"))
    return tmp_path / "pets"
