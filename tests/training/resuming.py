"""What a resumed run must share with an uncut one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_run import checkpoint_of, rows_of
from torch import Tensor


def assert_equal(found: Any, expected: Any, path: str = "") -> None:
    """The same nested values, bit for bit."""
    assert type(found) is type(expected), path
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{path}/{index}")
    else:
        assert found == expected, path


def metrics(run: Path) -> list[dict[str, str]]:
    """What was logged, but for the clock."""
    return [
        {key: value for key, value in row.items() if key not in ("train/images_per_second", "epoch")}
        for row in rows_of(run / "logs" / "metrics.csv")
    ]


def assert_same_end(run: Path, whole: Path) -> None:
    """Weights, moments, schedule, moving average and learned ratios are the same, bit for bit."""
    found, expected = checkpoint_of(run), checkpoint_of(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "diffratio", "ImageData"):
        assert_equal(found[key], expected[key], key)
    assert_equal(found["callbacks"]["WeightAverage"], expected["callbacks"]["WeightAverage"], "average")
    if (whole / "ratios.csv").is_file():
        assert (run / "ratios.csv").read_text() == (whole / "ratios.csv").read_text()
