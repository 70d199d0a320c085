"""Inpainting: holes in pictures, and what a model that fills them sees; only what is used is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffratio.inpainting.settings import InpaintSettings

if TYPE_CHECKING:
    from diffratio.inpainting.holes import SHAPES, hole
    from diffratio.inpainting.known import Known
    from diffratio.inpainting.masks import Masks

_LAZY = {"SHAPES": "holes", "hole": "holes", "Known": "known", "Masks": "masks"}  # these import torch

__all__ = ["SHAPES", "InpaintSettings", "Known", "Masks", "hole"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"diffratio.inpainting.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
