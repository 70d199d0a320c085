"""Training in latent space: what must agree between latents and model, and the pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffratio.backbones import backbone_of
from diffratio.backbones.base import TEXT_TOKENS
from diffratio.backbones.widening import image_channels
from diffratio.checkpoint import resolve, text_of
from diffratio.checkpoint.parts import scheduler_of
from diffratio.conditions.pipelines import local_folder, pipeline_text
from diffratio.data.latents import LatentData
from diffratio.errors import DiffratioError
from diffratio.files import read_json
from diffratio.sampling.schedulers import default_sampler, make_scheduler

_DIT_CLASSES = 1000  # that diffusers' pipeline is written for


def check_latents(transformer: nn.Module, data: LatentData, source: str | None, objective: str) -> None:
    """Checks latents against a model, and notes in it how many text tokens a sample has.

    Args:
        transformer: dense, possibly without weights.
        data: the latents.
        source: where the transformer came from; None of random weights.
        objective: what is trained.

    Raises:
        DiffratioError: another VAE, text encoder, size or number of channels or classes than the model's own, or
            another objective than its scheduler's.
    """
    manifest, backbone = data.manifest, backbone_of(transformer)
    channels, size = manifest.vae.channels, manifest.latent_size
    taken, side = image_channels(transformer), backbone.sample_side(transformer)
    if channels != taken:
        raise DiffratioError(
            f"data.source={data.source!r} holds latents of {channels} channels, and the model takes "
            f"{taken}; precompute them with the model's own VAE"
        )
    backbone.grid(transformer, torch.empty(1, channels, size, size, device="meta"))
    if size != side:
        free = f", or set backbone.config={{_token_side:{size // backbone.fold}}}" if backbone.fold > 1 else ""
        raise DiffratioError(
            f"data.source={data.source!r} holds latents of {size}x{size} (pictures of {manifest.image_size}), and the "
            f"model is of {side}x{side}; precompute them with "
            f"data.image_size={side * manifest.vae.factor}{free}"
        )
    folder = _folder(source)
    if folder is not None:
        _check_vae(folder, data)
        _check_objective(folder, objective)
        if data.vae is None and (folder / "vae" / "config.json").is_file():
            data.vae = str(folder)
    if backbone.condition == "text":
        _check_text(transformer, data, source)
    elif manifest.text is not None or manifest.classes != backbone.null_label(transformer):
        what = "captions" if manifest.text is not None else f"{manifest.classes} classes"
        raise DiffratioError(
            f"data.source={data.source!r} has {what}, and the model {backbone.null_label(transformer)} classes; "
            "precompute it with data.num_classes, or choose another backbone"
        )
    elif objective != "noise" or backbone.null_label(transformer) != _DIT_CLASSES:
        raise DiffratioError(
            f"class-conditional latents are sampled by diffusers' DiTPipeline, which takes objective=noise and "
            f"{_DIT_CLASSES} classes, and this is objective={objective} and {backbone.null_label(transformer)} classes"
        )


def base_scheduler(source: str | None) -> Any:
    """The scheduler of the pipeline that a transformer came from, so that a comparison samples both alike, or None."""
    folder = _folder(source)
    return scheduler_of(folder) if folder is not None and (folder / "scheduler").is_dir() else None


def own_scheduler(transformer: nn.Module, objective: str) -> Any:
    """The default scheduler of an objective, with the family's shift: the levels that a budget counts."""
    shift = backbone_of(transformer).level_shift(transformer)
    options = {"shift": shift} if shift != 1 and objective != "noise" else {}
    return make_scheduler(default_sampler(objective), objective, **options)


def _folder(source: str | None) -> Path | None:
    """The checkpoint's folder here, if only from the hub's cache."""
    place = resolve(source) if source else None
    return local_folder(place) if isinstance(place, str) else place


def _check_vae(folder: Path, data: LatentData) -> None:
    """Compares what the VAE's configuration says; its weights are compared when it is loaded."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return
    config, own = read_json(path, "VAE configuration"), data.manifest.vae
    # diffusers leaves a default out of no configuration, but files of earlier versions lack newer keys
    found = (config.get("latent_channels", 4), config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0)
    if found != (own.channels, own.scale, own.shift):
        raise DiffratioError(
            f"data.source={data.source!r} was made by vae {own}, and {str(path)!r} has {found[0]} channels, scale "
            f"{found[1]:g}, shift {found[2]:g}; precompute it anew with vae={folder}"
        )


def _check_objective(folder: Path, objective: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    config = read_json(path, "scheduler configuration", finite=False)
    flow = "FlowMatch" in str(config.get("_class_name")) or config.get("use_flow_sigmas")
    own = ("flow_sample" if config.get("prediction_type") == "sample" else "flow") if flow else "noise"
    if own != objective:
        raise DiffratioError(f"objective={objective}, and {str(folder)!r} predicts {own}; set objective={own}")


def _check_text(transformer: nn.Module, data: LatentData, source: str | None) -> None:
    backbone, own = backbone_of(transformer), data.manifest.text
    config: Any = transformer.config
    if own is None:
        raise DiffratioError(
            f"backbone {backbone.name} is conditioned on text, and data.source={data.source!r} has no captions; "
            "precompute it with text=..."
        )
    if own.width != backbone.text_width(transformer):
        raise DiffratioError(
            f"data.source={data.source!r} has text of {own}, and the model takes {backbone.text_width(transformer)} "
            "channels a token; precompute it with the model's own text encoder"
        )
    if own.pooled != backbone.pooled_width(transformer):
        raise DiffratioError(
            f"data.source={data.source!r} has text of {own}, and the model takes pooled states of "
            f"{backbone.pooled_width(transformer)} channels; precompute it with text=PIPELINE, whose encoders give them"
        )
    made_for = text_of(source) if source else None
    folder = _folder(source)
    pipeline = pipeline_text(folder) if folder is not None else None
    tokens, revision, where = config.get(TEXT_TOKENS), None, repr(source)
    if made_for is not None:
        tokens, revision = made_for.tokens, made_for.revision
    elif pipeline is not None:
        tokens, revision = tokens or pipeline.tokens, pipeline.revision
    if tokens is not None and tokens != own.tokens:
        raise DiffratioError(
            f"data.source={data.source!r} has text of {own.tokens} tokens, and {where} reads {tokens}; "
            f"precompute it with tokens={tokens}"
        )
    if revision is not None and revision != own.revision:
        raise DiffratioError(
            f"data.source={data.source!r} has text of {own}, and the encoder of {where} is of revision {revision}; "
            f"precompute it with text={source}"
        )
    if pipeline is not None and made_for is None and pipeline.lowered != (data.manifest.prepared == "lower"):
        raise DiffratioError(
            f"data.source={data.source!r} has captions in {data.manifest.prepared!r} form, and {where} puts prompts "
            f"{'into lower case' if pipeline.lowered else 'as they are'}; precompute it with text={source}"
        )
    backbone.set_text_tokens_(transformer, own.tokens)


def latent_samples(module: Any, data: LatentData, n: int, settings: Mapping[str, Any]) -> torch.Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] that the module's transformer samples for held-out conditions.

    Args:
        module: a `Training` module.
        data: whose conditions and VAE are used; no text encoder is needed.
        n: pictures.
        settings: steps and guidance_scale.
    """
    from diffratio.sampling.generate import generate
    from diffratio.sampling.latent import latent_pipeline
    from diffratio.surgery import attach_

    scheduler = own_scheduler(module.transformer, module.objective.name)
    coder = data.coder().to(module.device)
    pipe: Any = attach_(latent_pipeline(module.transformer, scheduler, coder, module.conditions))
    labels = data.held_out(n)[1].tolist()
    return generate(
        pipe, n, labels=labels, batch_size=min(n, 8), quiet=True, distributed=False, **settings
    )  # the other processes are not here
