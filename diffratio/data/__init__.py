"""Images for training and for reference: embedded sets, folders, parquet and hub data sets behind one data module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffratio.data.registry import embedded_folder, embedded_sets
from diffratio.data.subset import balanced_subset
from diffratio.errors import DiffratioError, unknown

if TYPE_CHECKING:
    from diffratio.data.images import ImageData
    from diffratio.inpainting import InpaintSettings

__all__ = ["ImageData", "balanced_subset", "embedded_folder", "embedded_sets", "open_data"]


def open_data(values: Mapping[str, Any], inpaint: InpaintSettings | None = None) -> ImageData:
    """The data module of a data config; `kind` says which one, pictures where it says nothing.

    Args:
        values: the config as plain data.
        inpaint: how pictures are masked; None leaves them whole.

    Raises:
        DiffratioError: an unknown kind or key, masks of latents, or what the module raises.
    """
    from diffratio.data.images import ImageData
    from diffratio.data.latents import KIND, LatentData

    kinds: dict[str, type[ImageData]] = {"images": ImageData, KIND: LatentData}
    given = dict(values)
    if given.get("source") is None:
        raise DiffratioError("data.source is null: give a folder of pictures, a hub id, or what precompute wrote")
    kind = given.pop("kind", "images")
    if kind not in kinds:
        raise unknown("data.kind", kind, kinds)
    if kind == KIND and given.pop("buckets", None) is not None:
        raise DiffratioError(
            "data.buckets cuts pictures, and data.kind=precomputed holds latents of one size; train buckets on pixels, "
            "or set data.buckets=null"
        )
    if inpaint is not None:
        if kind == KIND:
            raise DiffratioError("inpaint masks pictures, and data.kind=precomputed holds latents; train it on pixels")
        given["inpaint"] = inpaint
    try:
        return kinds[kind](**given)
    except TypeError as error:
        raise DiffratioError(f"data: {error}") from None


def __getattr__(name: str) -> Any:
    # ImageData is a LightningDataModule: importing lightning takes seconds that listing the sets should not cost.
    if name == "ImageData":
        from diffratio.data.images import ImageData

        return ImageData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
