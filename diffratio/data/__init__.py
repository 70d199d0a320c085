"""Images for training and for reference: embedded sets, folders, parquet and hub data sets behind one data module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffratio.data.registry import embedded_folder, embedded_sets
from diffratio.data.subset import balanced_subset

if TYPE_CHECKING:
    from diffratio.data.images import ImageData

__all__ = ["ImageData", "balanced_subset", "embedded_folder", "embedded_sets"]


def __getattr__(name: str) -> Any:
    # ImageData is a LightningDataModule: importing lightning takes seconds that listing the sets should not cost.
    if name == "ImageData":
        from diffratio.data.images import ImageData

        return ImageData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
