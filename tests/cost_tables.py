"""Synthetic tables of milliseconds, for models of the tests."""

from __future__ import annotations

from typing import Any

from diffratio.cost.table import LatencyTable
from diffratio.tokens.grid import TokenGrid

# bins 7 to 9 cost as much as the dense block, or more: on such a machine they do not pay
STEP = (0.01, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 10.0, 10.5, 10.0)
STEP_BINS = (0, 1, 2, 3, 4, 5, 6, 10)


def latency_table(row: tuple[float, ...] = STEP, layers: int = 3, width: int = 32, side: int = 4, **more: Any) -> Any:
    """A table of equal blocks; the defaults fit the model of `tiny_run`."""
    values: dict[str, Any] = {
        "family": "dit",
        "model": "DiTTransformer2DModel",
        "width": width,
        "grid": TokenGrid(side, side),
        "text_tokens": 0,
        "batch": 2,
        "alignment": 1,
        "shapes": (0,) * layers,
        "block_ms": (row,),
        "outer_ms": 1.0,
        "dtype": "float32",
        "device": "a machine",
        "threads": 1,
        "repeats": 10,
        "warmup": 2,
        "forward_ms": {"dense": 31.5},
        "provenance": {"python": "3"},
    }
    return LatencyTable(**(values | more))
