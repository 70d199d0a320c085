"""Writes a transformer, dense or routed, as a checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.backbones import Backbone, backbone_of
from diffratio.backbones.base import NOTES
from diffratio.backbones.widening import image_channels, inpaints
from diffratio.checkpoint import layout
from diffratio.checkpoint.card import Card
from diffratio.checkpoint.parts import check_pipeline, save_parts
from diffratio.checkpoint.readme import render_readme
from diffratio.errors import DiffratioError, unknown
from diffratio.files import atomic_folder, sha256, write_json
from diffratio.methods.base import Method, config_to_json
from diffratio.surgery import attachment, is_applied, merged_state

ROUTING_FORMAT, ROUTING_VERSION = "diffratio-routing", 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NOTE = "routed transformer: load it with diffratio.load_transformer; plain diffusers would run it dense"


def export(
    transformer: nn.Module,
    folder: str | Path,
    *,
    card: Card | Mapping[str, Any] | None = None,
    scheduler: Any | None = None,
    vae: Any | None = None,
    pipeline: Any | None = None,
    dtype: torch.dtype | str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint folder in diffusers layout, whole or not at all.

    With a learned method applied the checkpoint is routed: weights, routers and keep schedule. With nothing, or with a
    method that has no parameters, it is dense, and its transformer loads in plain diffusers. Adapters (LoRA of peft)
    are merged into the stored weights; `export_adapter` stores them alone.

    Args:
        transformer: a diffusers transformer of a known family, converted or not; stays as it is.
        folder: where to; a checkpoint of ours that is there is replaced.
        card: what is known of it; keys that are left out are filled in from the transformer.
        scheduler: a diffusers scheduler; None makes the one that the card's sampler and objective name.
        vae: decoder of a latent model, stored along.
        pipeline: the diffusers pipeline that holds the transformer, of a text-conditional model: its text encoders,
            tokenizers, VAE and scheduler are stored along. Without it `load_pipeline` needs to be told where they are.
        dtype: storage type of the weights, such as float16; routers stay float32. None keeps what they have.
        base: where the weights came from (name, sha256 ...), noted in `routing.json`.

    Returns:
        The folder.

    Raises:
        DiffratioError: keep ratios that are still learned, parameters that the family does not know, a card that
            contradicts the transformer, or a folder that is not writable or not ours.
    """
    backbone, learned = backbone_of(transformer), learned_method(transformer)
    storage = as_dtype(dtype)
    target = free_folder(folder)
    config: dict[str, Any] = {
        key: value
        for key, value in json.loads(transformer.to_json_string()).items()  # type: ignore[operator]
        if not key.startswith("_") or key in ("_class_name", "_diffusers_version", *NOTES)
    }
    config["_class_name"] = class_name = type(transformer).__name__  # a swapped class keeps the name
    state = _state(transformer, backbone, config, learned, storage)
    text = backbone.condition == "text"
    if pipeline is not None:
        if not text or vae is not None:
            raise DiffratioError("pipeline= stores all parts of a text-conditional model, in place of vae=")
        check_pipeline(pipeline, transformer)
        scheduler = pipeline.scheduler if scheduler is None else scheduler
    full_card, scheduler = completed(card, target.name, backbone, learned, transformer, scheduler)
    weights = layout.DENSE_WEIGHTS if learned is None else layout.ROUTED_WEIGHTS
    if learned is not None:
        config |= {"_class_name": f"Routed{class_name}", "_diffratio": _NOTE}
    parameters = sum(tensor.numel() for tensor in state.values())
    bins = getattr(learned, "bins", None)
    schedule = getattr(getattr(learned, "config", None), "schedule", None)
    fraction = learned.macs(schedule.run).fraction if learned is not None and schedule is not None else None

    with atomic_folder(target) as temporary:
        from safetensors.torch import save_file

        (temporary / layout.TRANSFORMER).mkdir()
        path = temporary / layout.TRANSFORMER / weights
        save_file(state, path, metadata={"format": "pt"})
        write_json(temporary / layout.TRANSFORMER / "config.json", config)
        scheduler.save_config(temporary / layout.SCHEDULER)
        if vae is not None:
            _save_vae(vae, temporary / layout.VAE)
        index = _index(config, scheduler, vae, full_card)
        if full_card.text is not None:
            index |= {"_class_name": "PixelTextPipeline", "text": full_card.text.to_json()}
        elif text:
            index["_class_name"] = backbone.pipeline if pipeline is None else type(pipeline).__name__
        parts = {} if pipeline is None else save_parts(pipeline, temporary)
        write_json(temporary / layout.INDEX, index | parts)
        write_json(temporary / layout.CARD, full_card.to_json())
        if learned is not None:
            document = {
                "format": ROUTING_FORMAT,
                "version": ROUTING_VERSION,
                "backbone": backbone.name,
                "class": class_name,
                "method": config_to_json(learned.config),
                "weights": {"file": weights, "sha256": sha256(path), "parameters": parameters},
            }
            write_json(temporary / layout.ROUTING, document | ({"base": dict(base)} if base else {}))
        readme = render_readme(full_card, parameters, bins, fraction, text)
        (temporary / layout.README).write_text(readme, encoding="utf-8")
    return target


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A storage or computing type by name; raises DiffratioError for one that is not offered."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise unknown("dtype", str(dtype).removeprefix("torch."), DTYPES)
    return DTYPES[dtype]  # type: ignore[index]


def is_router(key: str) -> bool:
    """Whether a state-dict key belongs to a router."""
    return ".router." in key


def learned_method(transformer: nn.Module) -> Method | None:
    """The applied method that has parameters, ready to be frozen into a file."""
    methods = attachment(transformer).methods if is_applied(transformer) else []
    learned = next((method for method in methods if method.learned), None)
    if getattr(learned, "ratios", None) is not None:
        raise DiffratioError(
            "keep ratios are still being learned: a checkpoint needs its fixed schedule; finish the training, which "
            "freezes them, or freeze them with method.freeze_(schedule)"
        )
    return learned


def free_folder(folder: str | Path) -> Path:
    """Where a checkpoint may be written; raises DiffratioError for a file, or a folder that is not ours."""
    target = Path(folder).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise DiffratioError(f"output folder {str(folder)!r} is a file; choose another folder")
    if target.is_dir() and any(target.iterdir()) and not layout.is_ours(target):
        raise DiffratioError(
            f"output folder {str(folder)!r} is not empty and not a diffratio checkpoint; choose another folder"
        )
    return target


def _state(
    transformer: nn.Module,
    backbone: Backbone,
    config: Mapping[str, Any],
    learned: Method | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """State dict as it is stored; its keys are those that a fresh model will ask for."""
    state = {}
    for key, tensor in merged_state(transformer).items():
        wanted = torch.float32 if is_router(key) else dtype
        floating = tensor.is_floating_point() and wanted is not None
        state[key] = tensor.detach().to("cpu", wanted if floating else tensor.dtype).contiguous()
    with torch.device("meta"):
        expected = set(backbone.from_config(public(config)).state_dict())
    if learned is not None:
        names = {id(module): name for name, module in transformer.named_modules()}
        for module in [*(learned.block_modules() or []), *learned.root_modules().values()]:
            expected |= {f"{names[id(module)]}.{key}" for key in module.state_dict()}
    if expected != set(state):
        raise DiffratioError(
            f"the transformer's parameters are not those of a {config['_class_name']}: {differences(state, expected)}; "
            "take what does not belong to the family out and unwrap the model before the export"
        )
    return state


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without its private keys."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def differences(found: Any, expected: Any) -> str:
    """Keys that are missing and keys that are too many, a few of each."""
    parts = []
    for what, keys in (("missing", set(expected) - set(found)), ("unexpected", set(found) - set(expected))):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (" ..." if len(keys) > 3 else "")
            parts.append(f"{len(keys)} {what} ({shown})")
    return " and ".join(parts)


def completed(
    card: Card | Mapping[str, Any] | None,
    name: str,
    backbone: Backbone,
    learned: Method | None,
    transformer: nn.Module,
    scheduler: Any | None,
) -> tuple[Card, Any]:
    """The card with everything that the transformer and the scheduler say, and the scheduler."""
    from diffratio.sampling.schedulers import make_scheduler, objective_of

    facts = {"kind": "dense" if learned is None else "routed", "backbone": backbone.name}
    if scheduler is not None:
        facts["objective"] = objective_of(scheduler)
    if isinstance(card, Card):
        given = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
    else:
        given = dict(card or {})
    for key, fact in facts.items():
        if given.get(key, fact) != fact:
            raise DiffratioError(f"card: {key} is {given[key]!r} and what is exported is {fact!r}; mend the card")
    full = Card.from_json({"name": name, **facts, **given})
    if full.text is not None:
        if backbone.condition != "text":
            raise DiffratioError(f"card: text is {full.text} and backbone {backbone.name} reads none; leave it out")
        width, pooled = backbone.text_width(transformer), backbone.pooled_width(transformer)
        if (full.text.width, full.text.pooled) != (width, pooled):
            raise DiffratioError(
                f"card: text of {full.text.width} channels, pooled {full.text.pooled}, for a transformer that reads "
                f"{width}, pooled {pooled}"
            )
    if full.inpaint is not None and not inpaints(transformer):
        raise DiffratioError(
            f"card: inpaint is {full.inpaint} and the transformer sees no more than pictures of "
            f"{image_channels(transformer)} channels; leave it out"
        )
    classes = backbone.null_label(transformer)
    if full.class_names and classes is not None and len(full.class_names) != classes:
        raise DiffratioError(f"card: {len(full.class_names)} class_names for a transformer of {classes} classes")
    return full, scheduler if scheduler is not None else make_scheduler(full.sampler.name, full.objective)


def _index(config: Mapping[str, Any], scheduler: Any, vae: Any | None, card: Card) -> dict[str, Any]:
    """model_index.json: a routed transformer names a class that diffusers does not have."""
    routed = card.kind == "routed"
    index: dict[str, Any] = {
        "_class_name": "PixelDiTPipeline" if vae is None else "DiTPipeline",
        "_diffusers_version": config["_diffusers_version"],
    }
    if card.id2label is not None:
        index["id2label"] = {str(key): name for key, name in card.id2label.items()}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["transformer"] = ["diffratio" if routed else "diffusers", config["_class_name"]]
    if vae is not None:
        index["vae"] = ["diffusers", type(vae).__name__]
    return index


def _save_vae(vae: Any, folder: Path) -> None:
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a path on the machine it came from
    write_json(folder / "config.json", config)
