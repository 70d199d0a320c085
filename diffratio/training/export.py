"""From a trained module, or a resumable checkpoint of one, to a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffratio.backbones import get_backbone
from diffratio.checkpoint import export, export_adapter
from diffratio.conditions import Captions, Conditions
from diffratio.conditions.mapped import MappedCaptions
from diffratio.data.images import ImageData
from diffratio.errors import DiffratioError
from diffratio.files import read_json
from diffratio.sampling.prompted import pipeline_guidance
from diffratio.sampling.schedulers import default_sampler, sampler_of
from diffratio.surgery import adapter_layers
from diffratio.training.build import build_data, build_module
from diffratio.training.latency import with_own_table
from diffratio.training.latents import own_scheduler
from diffratio.training.module import Training
from diffratio.training.reproduce import command
from diffratio.training.saving import read_resumable


def card_of(plain: dict[str, Any], result: dict[str, Any], conditions: Conditions) -> dict[str, Any]:
    """The card of a run's checkpoint."""
    # models in latent space are sampled by a pipeline that has its own encoder
    mapped = isinstance(conditions, MappedCaptions)
    text = conditions.encoder.to_json() if isinstance(conditions, Captions) and not mapped else None
    guidance = (2.0 if text is None else 3.0) if plain["budget"]["guidance"] else 1.0  # texts ask for more than classes
    if mapped:  # sampled by the family's usual pipeline
        guidance = pipeline_guidance(get_backbone(plain["backbone"]["name"]))
    return {
        "name": plain["name"],
        "backbone": plain["backbone"]["name"],
        "objective": plain["objective"]["name"],
        "sampler": {
            "name": default_sampler(plain["objective"]["name"]),
            "steps": plain["budget"]["steps"],
            "guidance_scale": guidance,
        },
        "data": result.get("data") or plain["data"]["name"] or plain["data"]["source"],
        "class_names": result.get("class_names", []),
        "text": text,
        "inpaint": plain["inpaint"] if (plain.get("inpaint") or {}).get("mask") else None,
        "training": {
            "method": plain["method"]["name"],
            "base": plain["backbone"]["source"],
            "steps": result.get("steps"),
            "batch_size": plain["data"]["batch_size"],
            "optimizer": plain["optimizer"],
            **({"lora": plain["lora"]} if (plain.get("lora") or {}).get("rank") else {}),
            "objective": plain["objective"],
            "budget": plain["budget"],
            "seed": plain["seed"],
            "seconds": result.get("seconds"),
        },
        "metrics": {
            key: result[key]
            for key in ("val_loss", "val_loss_regions", "val_loss_parts", "macs_fraction", "rounding", "latency")
            if result.get(key)
        },
        "licence": "Apache-2.0",
        "reproduce": command(plain, result.get("steps")),
    }


@torch.no_grad()
def final_losses(module: Training, data: Any, n: int) -> dict[str, Tensor]:
    """Losses (n, 4) of the module as it is, on the first held-out images, at fixed noise; see `fixed_losses`."""
    module.transformer.eval()
    return module.held_out_losses(data, n)


def _sampled(module: Training, card: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The scheduler that goes into the folder, and the card that names it."""
    if module.scheduler is None:
        return card, own_scheduler(module.transformer, card["objective"])
    return card | {"sampler": card["sampler"] | {"name": sampler_of(module.scheduler)[0]}}, module.scheduler


def export_module(module: Training, out: Path, card: dict[str, Any], dtype: torch.dtype | None = None) -> Path:
    """Writes a module's transformer as a checkpoint folder, with LoRA in the weights."""
    card, sampler = _sampled(module, card)
    vae = module.coder().vae if module.coder is not None else None
    return export(module.transformer, out, card=card, scheduler=sampler, dtype=dtype, vae=vae)


def export_module_adapter(module: Training, out: Path, card: dict[str, Any], dtype: torch.dtype | None = None) -> Path:
    """Writes what a LoRA job has trained as an adapter folder.

    Raises:
        DiffratioError: it trained no LoRA, or on random weights, which no file holds.
    """
    if not adapter_layers(module.transformer):
        raise DiffratioError("--adapter: this run trained all weights; leave it out, or train with lora=default")
    if module.base is None:
        raise DiffratioError(
            "--adapter: the base of this run had random weights (backbone.source=null), which cannot be loaded again; "
            "leave it out to export them merged"
        )
    card, sampler = _sampled(module, card)
    return export_adapter(module.transformer, out, module.base, card=card, scheduler=sampler, dtype=dtype)


def restored(plain: dict[str, Any], data: ImageData, saved: dict[str, Any]) -> Training:
    """A run's module with the weights of a checkpoint, the moving average where it has one.

    Args:
        plain: config of the run.
        data: of the run.
        saved: what `read_resumable` gives.
    """
    module = build_module(plain, data)
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    average = saved["callbacks"].get("WeightAverage")
    if average:
        ema = EMAModel(module.averaged())
        ema.load_state_dict(average)
        ema.copy_to(module.averaged())
    return module


def export_checkpoint(
    plain: dict[str, Any], folder: Path, out: Path, dtype: str | None, adapter: bool = False
) -> dict[str, Any]:
    """Rebuilds a run from its config and last checkpoint, and exports it.

    Args:
        plain: config of the run.
        folder: of the run.
        out: where to.
        dtype: storage type; routers stay float32.
        adapter: whether LoRA, routers and schedule are written alone; otherwise LoRA is merged into the weights.

    Raises:
        DiffratioError: no checkpoint, a damaged one, ratios that are not frozen yet, or nothing to write as an adapter.
    """
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise DiffratioError(f"{str(folder)!r} has no checkpoint yet (checkpoints/last.ckpt); train it first")
    saved = read_resumable(path)
    plain = with_own_table(plain, folder)
    module = restored(plain, build_data(plain), saved)
    if module.learning_ratios:
        raise DiffratioError(
            f"the keep ratios of {str(folder)!r} are still learned (step {saved['global_step']}); "
            "resume with ckpt_path=last until they are frozen, then export"
        )
    result: dict[str, Any] = {}
    result_file = folder / "result.json"
    if result_file.is_file():
        result = read_json(result_file, "result of the run")
    precision = getattr(torch, dtype) if dtype else None
    card = card_of(plain, {"steps": saved["global_step"], **result}, module.conditions)
    write = export_module_adapter if adapter else export_module
    written = write(module, out, card, precision)
    return {
        "out": str(written),
        "steps": saved["global_step"],
        "macs_fraction": module.method.macs(module.run).fraction,
    }
