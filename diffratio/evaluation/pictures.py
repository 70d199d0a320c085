"""PNGs of the report: token masks over pictures, and one figure of samples with the same noise in each column."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio.errors import DiffratioError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

COLUMNS, GAP = 10, 3  # how a comparison lays out its sample grids: pictures in a row, white pixels between them
INK = (122, 129, 137, 255)  # legible on white and on a dark page alike
COMPUTED = (250, 214, 84)  # light, so that more computed is also lighter without colour
SIDE = 112  # pixels of a picture in a mask strip, about
OPACITY = 0.85


@dataclass(frozen=True)
class Strip:
    """One row of a sample figure: the first pictures of one arm."""

    name: str
    note: str
    image: Image


def slug(text: str) -> str:
    """A name that is safe as part of a file name and of a record's image path."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.") or "x"


def png_bytes(image: Image) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png_size(content: bytes, where: str) -> tuple[int, int]:
    """Width and height in pixels of a PNG's content.

    Raises:
        DiffratioError: it is none.
    """
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise DiffratioError(f"image {where!r} is not a PNG; write it again or take it out of its record")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def first_row(content: bytes, columns: int = COLUMNS) -> Image | None:
    """The first row of a grid of square pictures, without the magnification that the grid was drawn with.

    Args:
        content: a PNG of rows of `columns` pictures with `GAP` pixels between them.
        columns: pictures in a row.

    Returns:
        One row of `columns` pictures, or None where the size does not fit such a grid.
    """
    from PIL import Image as pil

    with pil.open(io.BytesIO(content)) as opened:
        grid = opened.convert("RGB") if opened.mode not in ("L", "RGB") else opened.copy()
    pitch, rest = divmod(grid.width + GAP, columns)
    if rest or pitch <= GAP or (grid.height + GAP) % pitch:
        return None
    row = grid.crop((0, 0, grid.width, pitch - GAP))
    if row.width % GAP == 0 and row.height % GAP == 0:  # grids repeat every pixel as often as a gap is wide
        small = row.resize((row.width // GAP, row.height // GAP), pil.Resampling.NEAREST)
        if small.resize(row.size, pil.Resampling.NEAREST).tobytes() == row.tobytes():
            return _clear_gaps(small, columns, 1)
    return _clear_gaps(row, columns, GAP)


def _clear_gaps(row: Image, columns: int, gap: int) -> Image:
    """Lets the page show between the pictures."""
    clear = row.convert("RGBA")
    side = (row.width + gap) // columns - gap
    for column in range(1, columns):
        right = column * (side + gap)
        clear.paste((255, 255, 255, 0), (right - gap, 0, right, row.height))
    return clear


def sample_figure(strips: Sequence[Strip], heads: Sequence[str]) -> Image:
    """One figure: a row an arm, a column for each noise.

    Args:
        strips: rows of equal size, from top to bottom.
        heads: what stands above each column; empty for none.

    Returns:
        A picture on a transparent ground.
    """
    from PIL import Image as pil
    from PIL import ImageDraw

    scale = max(1, round(760 / strips[0].image.width))
    width, height = strips[0].image.width * scale, strips[0].image.height * scale
    left, top, pitch = 190, 24 if heads else 0, height + 8
    canvas = pil.new("RGBA", (left + width, top + len(strips) * pitch - 8))
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        _text(draw, (left + (column + 0.5) * width / len(heads), top / 2), head, 12, "mm", width / len(heads) - 6)
    for row, strip in enumerate(strips):
        y = top + row * pitch
        canvas.paste(strip.image.resize((width, height), pil.Resampling.NEAREST), (left, y))
        _text(draw, (0, y + height / 2 - 9), strip.name, 15, "lm", left - 10)
        _text(draw, (0, y + height / 2 + 10), strip.note, 12, "lm", left - 10)
    return canvas


def draw_masks(pictures: Tensor, computed: Tensor, heads: Sequence[str], names: Sequence[str]) -> Image:
    """A strip of pairs of rows: the picture predicted at a step, and over it what was computed of each token.

    Args:
        pictures: (steps, B, C, H, W) in [-1, 1].
        computed: share of the blocks that computed a token, (steps, B, token rows, token columns), 0..1.
        heads: one line a step.
        names: one line a picture.

    Returns:
        A picture on a transparent ground, with a key.
    """
    from PIL import Image as pil
    from PIL import ImageDraw

    steps, batch, height, width = *pictures.shape[:2], *pictures.shape[-2:]
    scale = max(1, round(SIDE / width))
    wide, high = width * scale, height * scale
    left, top, key, gap = 112, 54, 50, 6
    canvas = pil.new("RGBA", (left + steps * (wide + gap), top + batch * (2 * high + 3 * gap) + key))
    draw = ImageDraw.Draw(canvas)
    for step in range(steps):
        x = left + step * (wide + gap)
        _text(draw, (x + wide / 2, 14), heads[step], 17, "mm", wide + gap)
        share = float(computed[step].mean())
        _text(draw, (x + wide / 2, 38), f"{100 * share:.0f} % computed", 15, "mm", wide + gap)
        for sample in range(batch):
            y = top + sample * (2 * high + 3 * gap)
            picture = _pil(pictures[step, sample])
            plain = picture.resize((wide, high), pil.Resampling.NEAREST)
            canvas.paste(plain, (x, y))
            canvas.paste(_overlay(plain, computed[step, sample]), (x, y + high + gap))
    for sample in range(batch):
        y = top + sample * (2 * high + 3 * gap)
        _text(draw, (0, y + high / 2), names[sample], 18, "lm", left - 8)
        _text(draw, (0, y + high * 1.5 + gap), "computed", 15, "lm", left - 8)
    _key(canvas, draw, left, canvas.height - key + 10)
    return canvas


def _key(canvas: Image, draw: Any, x: int, y: int) -> None:
    import torch
    from PIL import Image as pil

    ramp = _overlay(pil.new("RGB", (120, 14), (60, 60, 60)), torch.linspace(0, 1, 120)[None])
    _text(draw, (x, y + 7), "0", 16, "lm", 20)
    canvas.paste(ramp, (x + 16, y))
    _text(draw, (x + 144, y + 7), "1   share of the blocks that computed a token", 16, "lm", canvas.width - x - 140)


def _overlay(picture: Image, share: Tensor) -> Image:
    """The picture, dimmed, under a light sheet that is as opaque as the tokens were computed."""
    import numpy as np
    from PIL import Image as pil

    dim = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] * 0.32  # (H, W, 1)
    mask = pil.fromarray((share.clamp(0, 1) * 255).round().byte().cpu().numpy()).resize(
        picture.size, pil.Resampling.NEAREST
    )
    alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255 * OPACITY
    sheet = np.asarray(COMPUTED, dtype=np.float32)
    return pil.fromarray((dim * (1 - alpha) + sheet * alpha).round().astype("uint8"))


def _pil(picture: Tensor) -> Image:
    from PIL import Image as pil

    pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()  # (H, W, C)
    return pil.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]).convert("RGB")


def _text(draw: Any, place: tuple[float, float], text: str, size: int, anchor: str, room: float) -> None:
    """One line, cut where it has no room."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    while len(text) > 1 and draw.textlength(text, font) > room:
        text = text[:-2].rstrip("…") + "…" if len(text) > 2 else text[:1]
    draw.text(place, text, fill=INK, font=font, anchor=anchor)


def read_png(folder: Path, name: str) -> bytes | None:
    """Content of a PNG inside a comparison folder; None where it is missing.

    Raises:
        DiffratioError: it lies outside the folder, or is no PNG.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DiffratioError(f"image {name!r} lies outside the comparison folder {str(folder)!r}; copy it inside")
    if not path.is_file():
        return None
    content = path.read_bytes()
    png_size(content, str(folder / name))
    return content
