"""Shapes of holes, drawn to a share of the picture.

A shape is a distance field; the hole is where it is small. Growing the shape until the share is met makes every share
reachable, whatever was drawn.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SHAPES = ("boxes", "strokes", "mixed")

Field = NDArray[np.float32]
_MOST = 4  # boxes or strokes in one mask
_TURN = 1.2  # largest turn between two segments of a stroke, in radians


Size = int | tuple[int, int]  # side of a square, or height and width


def hole(shape: str, size: Size, share: tuple[float, float], generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draws one mask.

    Args:
        shape: one of `SHAPES`; `mixed` is either of the others at even odds.
        size: side of the square picture, or its height and width, in pixels.
        share: lowest and highest share that is hole; the share is uniform between.
        generator: of the draws.

    Returns:
        (H, W), True in the hole. Its pixels are within `share`, rounded inwards where a whole pixel fits in.
    """
    wanted = generator.uniform(*share)
    if shape == "mixed":
        shape = SHAPES[int(generator.integers(2))]
    height, width = (size, size) if isinstance(size, int) else size
    field = (_boxes if shape == "boxes" else _strokes)(height, width, generator)
    pixels = height * width
    least = min(max(1, math.ceil(share[0] * pixels - 1e-9)), pixels)
    most = max(least, math.floor(share[1] * pixels + 1e-9))
    return _nearest(field, min(max(round(wanted * pixels), least), most), least, most)


def _nearest(field: Field, wanted: int, least: int, most: int) -> NDArray[np.bool_]:
    """The `wanted` nearest pixels; equally near ones stay together where the number allows it."""
    edge = np.partition(field, wanted - 1, axis=None)[wanted - 1]
    for whole in (field <= edge, field < edge):
        if least <= int(whole.sum()) <= most:
            return whole
    chosen = np.zeros(field.size, dtype=bool)
    chosen[np.argsort(field, axis=None, kind="stable")[:wanted]] = True
    return chosen.reshape(field.shape)


def _boxes(height: int, width: int, generator: np.random.Generator) -> Field:
    """Distance to up to four rectangles that grow from their centres."""
    row, column = _middles(height, width)
    field = np.full((height, width), np.inf, dtype=np.float32)
    for _ in range(int(generator.integers(1, _MOST + 1))):
        top, left = generator.uniform(0, (height, width))
        stretch = 2 ** generator.uniform(-1, 1)
        scale = generator.uniform(0.5, 1.0)
        box = np.maximum(np.abs(row - top) * (stretch / scale), np.abs(column - left) / (stretch * scale))
        field = np.minimum(field, box)
    return field


def _strokes(height: int, width: int, generator: np.random.Generator) -> Field:
    """Squared distance to up to four winding lines."""
    row, column = _middles(height, width)
    side = math.sqrt(height * width)
    field = np.full((height, width), np.inf, dtype=np.float32)
    for _ in range(int(generator.integers(1, _MOST + 1))):
        y, x = generator.uniform(0, (height, width))
        angle = generator.uniform(0, 2 * math.pi)
        for _ in range(int(generator.integers(2, 6))):
            length = generator.uniform(0.1, 0.4) * side
            angle += generator.uniform(-_TURN, _TURN)
            along_y, along_x = math.sin(angle), math.cos(angle)
            down, right = row - np.float32(y), column - np.float32(x)  # (size, 1) and (1, size)
            along = down * np.float32(along_y) + right * np.float32(along_x)
            past = along - np.minimum(np.maximum(along, 0), np.float32(length))  # 0 beside the segment
            across = down * np.float32(along_x) - right * np.float32(along_y)
            field = np.minimum(field, past * past + across * across)
            y = min(max(y + length * along_y, 0.0), float(height))
            x = min(max(x + length * along_x, 0.0), float(width))
    return field


def _middles(height: int, width: int) -> tuple[Field, Field]:
    """Coordinates of the pixels' middles, (height, 1) and (1, width)."""
    rows, columns = (np.arange(side, dtype=np.float32) + np.float32(0.5) for side in (height, width))
    return rows[:, None], columns[None]
