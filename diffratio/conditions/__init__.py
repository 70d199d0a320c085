"""What a sample is conditioned on: a class, or a caption as a text encoder's output; only what is used is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffratio.conditions.identity import EncoderId

if TYPE_CHECKING:
    from diffratio.conditions.base import Classes, Conditions
    from diffratio.conditions.captions import (
        Captions,
        cached_captions,
        encode_captions,
        load_captions,
        save_captions,
    )
    from diffratio.conditions.encoders import TextEncoder, encoder_names, text_encoder
    from diffratio.conditions.several import EncoderSet

_LAZY = {  # these import torch
    "Classes": "base",
    "Conditions": "base",
    "Captions": "captions",
    "cached_captions": "captions",
    "encode_captions": "captions",
    "load_captions": "captions",
    "save_captions": "captions",
    "EncoderSet": "several",
    "TextEncoder": "encoders",
    "encoder_names": "encoders",
    "text_encoder": "encoders",
}

__all__ = [
    "Captions",
    "Classes",
    "Conditions",
    "EncoderId",
    "EncoderSet",
    "TextEncoder",
    "cached_captions",
    "encode_captions",
    "encoder_names",
    "load_captions",
    "save_captions",
    "text_encoder",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"diffratio.conditions.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
