"""Uniform intervals between computed steps, and the blocks that caches leave to every step."""

from __future__ import annotations

import math


def computed(step: int, every: float) -> bool:
    """Whether a step is computed where each `every`-th one is: steps 0, n, 2n ...

    Between two whole numbers both intervals occur, evenly spread: of S steps S / every are computed, rounded up.
    """
    if step == 0:
        return True
    return math.floor(step / every + 1e-9) > math.floor((step - 1) / every + 1e-9)


def inner_blocks(layers: int) -> tuple[int, int]:
    """First and last of all blocks but the first and the last one; of fewer than three blocks the last one alone."""
    first = min(1, layers - 1)
    return first, max(first, layers - 2)
