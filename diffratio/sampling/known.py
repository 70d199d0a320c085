"""What a pipeline is given to inpaint: pictures and masks in any usual form, checked against its transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffratio.backbones.widening import image_channels, inpaints
from diffratio.errors import DiffratioError
from diffratio.files import in_mode, open_picture
from diffratio.inpainting import Known


def known_of(transformer: Any, image: Any, mask: Any, batch: int) -> Known | None:
    """Pictures and masks of a batch; None for a model that sees none.

    Args:
        transformer: that will see them.
        image: (B, C, H, W) or (1, C, H, W) in [-1, 1], a PIL picture, or a list of B.
        mask: (B, 1, H, W) or (1, 1, H, W), 1 in the hole; or as `image`, white in the hole. One serves all samples.
        batch: samples B.

    Raises:
        DiffratioError: something is missing, given for nothing, or does not fit.
    """
    if not inpaints(transformer):
        if image is not None or mask is not None:
            given = [name for name, one in (("image", image), ("mask", mask)) if one is not None]
            raise DiffratioError(
                f"{' and '.join(given)}: for inpainting models, and this one sees the noised picture alone; leave it "
                "out, or train one with inpaint=default"
            )
        return None
    if image is None or mask is None:
        lacking = [name for name, one in (("image", image), ("mask", mask)) if one is None]
        raise DiffratioError(
            f"this is an inpainting model and {' and '.join(lacking)} is missing: give a picture and its mask (1 or "
            "white = hole)"
        )
    channels = image_channels(transformer)
    images = _stacked("image", image, channels, batch)
    masks = _stacked("mask", mask, 1, batch)
    if images.shape[2:] != masks.shape[2:]:
        (height, width), (h, w) = images.shape[2:], masks.shape[2:]
        raise DiffratioError(f"the mask is {h}x{w} and the picture {height}x{width}; scale one to the other's size")
    return Known(images, masks)


def _stacked(name: str, given: Any, channels: int, batch: int) -> Tensor:
    """(B, C, H, W) float32: pictures in [-1, 1], masks 0 or 1."""
    if isinstance(given, Tensor):
        found = given.detach().float()
        if found.ndim != 4 or found.shape[1] != channels:
            raise DiffratioError(f"{name} of shape {tuple(given.shape)} must be (B, {channels}, H, W)")
        if name == "mask":
            found = (found > 0.5).float()
    else:
        pictures = list(given) if isinstance(given, list | tuple) else [given]
        tensors = [_of_picture(name, picture, channels) for picture in pictures]
        sizes = sorted({f"{one.shape[1]}x{one.shape[2]}" for one in tensors})
        if len(sizes) > 1:
            raise DiffratioError(f"{name}: pictures of {' and '.join(sizes)}; give all of one size")
        found = torch.stack(tensors) if tensors else torch.empty(0, channels, 1, 1)
    if len(found) not in (1, batch):
        raise DiffratioError(f"{len(found)} {name}s for {batch} samples: give one for all, or one for each")
    return found.expand(batch, -1, -1, -1)


def _of_picture(name: str, picture: Any, channels: int) -> Tensor:
    from PIL import Image

    if not isinstance(picture, Image.Image):
        raise DiffratioError(f"{name} must be a tensor or PIL pictures, got {type(picture).__name__}")
    grey = channels == 1
    array = torch.from_numpy(np.array(in_mode(picture, "L" if grey else "RGB")))
    pixels = array[None] if grey else array.permute(2, 0, 1)  # (C, H, W)
    return (pixels >= 128).float() if name == "mask" else pixels.float() / 127.5 - 1


def triples(known: Known, samples: Tensor) -> Tensor:
    """Original, masked and filled picture of each sample in turn, (3 n, C, H, W) in [-1, 1]."""
    return torch.stack([known.images.cpu(), known.masked.cpu(), samples], dim=1).flatten(0, 1)


def read_pictures(paths: Sequence[str]) -> list[Any]:
    """PIL pictures of files, upright.

    Raises:
        DiffratioError: one cannot be read; names it.
    """
    from PIL import ImageOps

    found = []
    for path in paths:
        try:
            with open_picture(path) as picture:
                picture.load()
                found.append(ImageOps.exif_transpose(picture))
        except Exception as error:  # damaged files raise anything from OSError to SyntaxError
            raise DiffratioError(f"picture {path!r} cannot be read ({error}); give a PNG or JPEG") from None
    return found
