"""Checkpoint folders in diffusers layout: export, load, model card; only what is used is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffratio.checkpoint.card import Card, SamplerSettings, read_card
from diffratio.checkpoint.layout import (
    checkpoint_kind,
    checkpoints_root,
    list_checkpoints,
    require_kind,
    resolve,
    shipped_beside,
)

if TYPE_CHECKING:
    from diffratio.checkpoint.adapter import BaseWeights, export_adapter
    from diffratio.checkpoint.load import load_pipeline, load_skeleton, load_transformer, text_of
    from diffratio.checkpoint.save import export

# these import torch and diffusers
_LAZY = {
    "export": "diffratio.checkpoint.save",
    "BaseWeights": "diffratio.checkpoint.adapter",
    "export_adapter": "diffratio.checkpoint.adapter",
    "load_transformer": "diffratio.checkpoint.load",
    "load_pipeline": "diffratio.checkpoint.load",
    "load_skeleton": "diffratio.checkpoint.load",
    "text_of": "diffratio.checkpoint.load",
}

__all__ = [
    "BaseWeights",
    "Card",
    "SamplerSettings",
    "checkpoint_kind",
    "checkpoints_root",
    "export",
    "export_adapter",
    "list_checkpoints",
    "load_pipeline",
    "load_skeleton",
    "load_transformer",
    "read_card",
    "require_kind",
    "resolve",
    "shipped_beside",
    "text_of",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
