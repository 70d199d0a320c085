"""From an encoded picture to pixels of one size."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffratio.files import in_mode, open_picture

if TYPE_CHECKING:
    from PIL import Image


Size = int | tuple[int, int]  # side of a square, or height and width
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112


def decode(record: dict[str, Any], *, size: Size, channels: int, pad: bool) -> NDArray[np.uint8]:
    """Decodes one picture of a Hugging Face image column.

    Args:
        record: `bytes` of the encoded picture, or the `path` of its file.
        size: side of the square result, or its height and width, in pixels.
        channels: 1 (grey) or 3 (RGB); transparent pixels become white.
        pad: whether a picture that fits in is centred on black instead of enlarged.

    Returns:
        Pixels, (C, H, W) uint8.

    Raises:
        Exception: whatever the decoder raises on a picture that is damaged.
    """
    with _opened(record) as opened:
        image = in_mode(opened, "L" if channels == 1 else "RGB")
    height, width = (size, size) if isinstance(size, int) else size
    pixels = np.asarray(_to_size(image, (width, height), pad), dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def size_of(record: dict[str, Any]) -> tuple[int, int]:
    """Height and width that a picture decodes to, from its header alone; raises what `decode` raises."""
    with _opened(record) as opened:
        width, height = opened.size
        turned = opened.getexif().get(_ORIENTATION) in _TURNED
    return (width, height) if turned else (height, width)


def _opened(record: dict[str, Any]) -> Image.Image:
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError("the row holds no image")
    return open_picture(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"]))


def _to_size(image: Image.Image, size: tuple[int, int], pad: bool) -> Image.Image:
    from PIL import Image, ImageOps

    width, height = size
    if image.size == size:
        return image
    if pad and image.width <= width and image.height <= height:
        canvas = Image.new(image.mode, size, 0)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)  # scaled and cropped at the centre
