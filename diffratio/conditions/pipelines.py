"""What a diffusers pipeline folder says about the text that its transformer reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.conditions.encoders import ENCODER, TOKENIZER, weights_revision
from diffratio.errors import DiffratioError
from diffratio.files import read_json

_INDEX = "model_index.json"


@dataclass(frozen=True)
class PipelineText:
    """How a pipeline prepares prompts.

    Args:
        revision: of its text encoder's weights; None where the folder has no encoder.
        tokens: that it pads prompts to; None where it does not say.
        lowered: whether it puts them into lower case, without spaces around.
    """

    revision: str | None
    tokens: int | None
    lowered: bool


def pipeline_text(folder: str | Path) -> PipelineText | None:
    """Reads a pipeline folder without loading anything; None where it is none of a class of diffusers."""
    path = Path(folder).expanduser()
    if not (path / _INDEX).is_file():
        return None
    index = read_json(path / _INDEX, "pipeline index")
    import diffusers

    kind: Any = getattr(diffusers, str(index.get("_class_name")), None) if isinstance(index, dict) else None
    if kind is None:
        return None
    parameter = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    tokens = parameter.default if parameter is not None and type(parameter.default) is int else None
    revision = weights_revision(path) if (path / ENCODER).is_dir() else None
    return PipelineText(revision, tokens, hasattr(kind, "_text_preprocessing"))


def local_folder(name: str, download: bool = False) -> Path | None:
    """The folder of a pipeline's text encoder and tokenizer here.

    Args:
        name: a folder, or the hub id of a pipeline.
        download: whether those two may be downloaded; otherwise what lies in the hub's cache is all.

    Returns:
        The pipeline's folder, or None where there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [_INDEX, f"{ENCODER}/*", f"{TOKENIZER}/*"]
    try:
        found = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if download and not isinstance(error, LocalEntryNotFoundError):
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DiffratioError(f"text encoder {name!r} cannot be had from the hub ({first[:200]})") from None
        return None
    return found if (found / ENCODER).is_dir() else None
