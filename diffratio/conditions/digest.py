"""Revisions of text encoders: what changes with their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # where a pipeline keeps them
_ENDS = 1 << 20  # bytes


def weights_revision(folder: Path) -> str:
    """Changes with an encoder's weights; of large ones the ends and the size stand for the whole.

    Args:
        folder: of the encoder, or of a pipeline that has one.
    """
    return _digest(folder / ENCODER if (folder / ENCODER).is_dir() else folder)[:12]


def encoders_revision(folder: Path, parts: Sequence[str]) -> str:
    """Changes with the weights of any encoder of a set.

    Args:
        folder: of a pipeline.
        parts: names of its encoders.
    """
    return hashlib.sha256("".join(f"{part}:{_digest(folder / part)}" for part in parts).encode()).hexdigest()[:12]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _weights(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(_ENDS))
            handle.seek(max(0, size - _ENDS))
            digest.update(handle.read())
    return digest.hexdigest()


def _weights(folder: Path) -> list[Path]:
    """Weight files, without a second copy in half precision, which is there or not as one was downloaded."""
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if ".fp16" not in path.name] or files
