"""What a text-conditional pipeline holds beside its transformer: text encoders, tokenizers, VAE, scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffratio.backbones import backbone_of
from diffratio.checkpoint import layout
from diffratio.checkpoint.bounds import check_scheduler
from diffratio.conditions.index import read_index
from diffratio.errors import DiffratioError, first_line
from diffratio.files import read_json, write_json
from diffratio.sampling.vae import cast_

_PATHS = ("_name_or_path", "name_or_path")  # where a part came from: a path on the machine that wrote it


def check_pipeline(pipeline: Any, transformer: nn.Module) -> None:
    """Raises DiffratioError unless it is a diffusers pipeline around that very transformer."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline):
        raise DiffratioError(f"pipeline is a {type(pipeline).__name__}; give a diffusers pipeline, or None")
    if getattr(pipeline, "transformer", None) is not transformer:
        raise DiffratioError(
            f"the {type(pipeline).__name__} holds another transformer than the one that is exported; "
            "export(pipe.transformer, folder, pipeline=pipe)"
        )


def save_parts(pipeline: Any, folder: Path) -> dict[str, Any]:
    """Writes every part but transformer and scheduler, each into its own folder.

    Args:
        pipeline: a diffusers pipeline.
        folder: of the checkpoint.

    Returns:
        Their entries for `model_index.json`, and the pipeline's other settings.

    Raises:
        DiffratioError: a part that cannot be saved.
    """
    index: dict[str, Any] = {}
    for name, value in pipeline.config.items():
        if name.startswith("_") or name in (layout.TRANSFORMER, layout.SCHEDULER):
            continue
        index[name] = list(value) if isinstance(value, list | tuple) else value
        part = pipeline.components.get(name)
        if part is None:
            continue
        if not hasattr(part, "save_pretrained"):
            raise DiffratioError(f"{name} of the pipeline is a {type(part).__name__}, which cannot be saved")
        part.save_pretrained(folder / name)
        for path in sorted((folder / name).glob("*.json")):
            _forget_paths(path)
    return index


def _forget_paths(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, dict) and any(key in document for key in _PATHS):
        write_json(path, {key: value for key, value in document.items() if key not in _PATHS})


def pipeline_around(transformer: nn.Module, folder: Path, parts: Any, device: torch.device | str) -> Any:
    """The diffusers pipeline of a text-conditional transformer.

    Args:
        transformer: loaded already, routed or not; the other parts take its computing type.
        folder: the transformer's checkpoint, whose scheduler counts where it has one.
        parts: the checkpoint that holds the other parts, or a pipeline whose parts are shared.
        device: where they go.

    Raises:
        DiffratioError: no such pipeline class, or parts that are missing or damaged.
    """
    import diffusers

    if not isinstance(parts, Path):
        named = next(one for one in type(parts).__mro__ if one.__module__.startswith("diffusers."))
        return _made(named, parts, transformer, folder).to(device)
    path = parts / layout.INDEX
    index = read_index(path)
    kind = getattr(diffusers, index["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise DiffratioError(f"{str(path)!r}: _class_name {index.get('_class_name')!r} is no pipeline of diffusers")
    missing = [
        name
        for name, value in index.items()
        if name != layout.TRANSFORMER
        and isinstance(value, list)
        and value[:1] != [None]
        and not (parts / name).is_dir()
    ]
    if missing or not any(name.startswith("text_encoder") for name in index):
        raise DiffratioError(
            f"{str(parts)!r} lacks {', '.join(missing) or 'a text encoder'}: export with pipeline=pipe stores it "
            "along, or name the dense pipeline that has it, load_pipeline(folder, parts=...)"
        )
    dtype = next(transformer.parameters()).dtype
    types = {"default": dtype, layout.VAE: torch.float32}
    options: dict[str, Any] = {"transformer": None, "torch_dtype": types, "use_safetensors": True}
    try:
        loaded = kind.from_pretrained(parts, local_files_only=True, **options)
    except Exception as error:  # parts of two libraries, whose damaged files raise anything
        raise DiffratioError(f"pipeline {str(parts)!r} cannot be loaded: {first_line(error)}") from None
    if getattr(loaded, layout.VAE, None) is not None:
        cast_(loaded.vae, dtype)
    return _made(kind, loaded, transformer, folder).to(device)


def _made(kind: Any, like: Any, transformer: nn.Module, folder: Path) -> Any:
    """A pipeline with the parts of another one, made anew: some read the transformer's configuration here."""
    components = {**like.components, layout.TRANSFORMER: transformer}
    if (folder / layout.SCHEDULER).is_dir():
        components[layout.SCHEDULER] = scheduler_of(folder)
    settings = {key: value for key, value in like.config.items() if key not in components and key[:1] != "_"}
    return kind(**components, **settings)


def scheduler_of(folder: Path) -> Any:
    """The scheduler of a checkpoint folder.

    Raises:
        DiffratioError: there is none, or it is none of diffusers.
    """
    import diffusers

    path = folder / layout.SCHEDULER / "scheduler_config.json"
    config = read_json(path, "scheduler configuration", finite=False)
    name = config.get("_class_name") if isinstance(config, dict) else None
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise DiffratioError(f"{str(path)!r}: _class_name {name!r} is no scheduler of diffusers")
    check_scheduler(config, path, kind)
    try:
        return kind.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # what constructors raise on values that nobody gave them before
        raise DiffratioError(f"{str(path)!r}: {first_line(error)}") from None


def is_text(transformer: nn.Module) -> bool:
    """Whether it is conditioned on text."""
    return backbone_of(transformer).condition == "text"
