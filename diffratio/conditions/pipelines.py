"""What a diffusers pipeline folder says about the text that its transformer reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.conditions.digest import ENCODER, weights_revision
from diffratio.conditions.index import INDEX, read_index
from diffratio.conditions.several import has_several, hub_folder, set_revision, usual_tokens


@dataclass(frozen=True)
class PipelineText:
    """How a pipeline prepares prompts.

    Args:
        revision: of the weights of its text encoder, or of all of them together; None where the folder has none.
        tokens: that it pads prompts to, by all its encoders together; None where it does not say.
        lowered: whether it puts them into lower case, without spaces around.
    """

    revision: str | None
    tokens: int | None
    lowered: bool


def pipeline_text(folder: str | Path) -> PipelineText | None:
    """Reads a pipeline folder without loading anything; None where it is none of a class of diffusers."""
    path = Path(folder).expanduser()
    if not (path / INDEX).is_file():
        return None
    if has_several(path):
        return PipelineText(set_revision(path), usual_tokens(path), False)
    import diffusers

    kind: Any = getattr(diffusers, read_index(path / INDEX)["_class_name"], None)
    if kind is None:
        return None
    parameter = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    tokens = parameter.default if parameter is not None and type(parameter.default) is int else None
    revision = weights_revision(path) if (path / ENCODER).is_dir() else None
    return PipelineText(revision, tokens, hasattr(kind, "_text_preprocessing"))


def local_folder(name: str, download: bool = False) -> Path | None:
    """The folder of a pipeline's text encoders and tokenizers here.

    Args:
        name: a folder, or the hub id of a pipeline.
        download: whether those may be downloaded; otherwise what lies in the hub's cache is all.

    Returns:
        The pipeline's folder, or None where there is none.
    """
    path = Path(name).expanduser()
    return path if path.is_dir() else hub_folder(name, download)
