"""Adapter folders: LoRA weights in peft's format, routers and keep schedule, and the base that they stand on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.backbones.base import NOTES, notes_in
from diffratio.checkpoint import layout
from diffratio.checkpoint.card import Card
from diffratio.checkpoint.readme import render_readme
from diffratio.checkpoint.save import as_dtype, completed, differences, free_folder, learned_method
from diffratio.checkpoint.stored import stored_lora, stored_method
from diffratio.checkpoint.weights import check_values, read_weights
from diffratio.errors import DiffratioError, first_line
from diffratio.files import atomic_folder, read_json, sha256, write_json
from diffratio.methods.base import config_to_json
from diffratio.surgery import adapter_layers, apply_, is_applied, merge_lora_, weights_digest
from diffratio.surgery.adapters import ADAPTER, inject_, require_peft

FORMAT, VERSION = "diffratio-adapter", 1
CONFIG, WEIGHTS, ROUTERS = "adapter_config.json", "adapter_model.safetensors", "routers.safetensors"
_PREFIX = "base_model.model."  # of the keys in peft's files


@dataclass(frozen=True)
class BaseWeights:
    """The dense weights that an adapter was trained on.

    Args:
        source: a checkpoint folder, the name of one that ships, or a hub id.
        sha256: their `surgery.weights_digest`.
        revision: commit of a hub id; None is the newest.
    """

    source: str
    sha256: str
    revision: str | None = None

    @classmethod
    def of(cls, source: str | Path, transformer: nn.Module) -> BaseWeights:
        """The base of a transformer that was loaded from a source, before its weights were trained.

        Args:
            source: as given to `load_transformer`.
            transformer: loaded from there; adapters and routers in it do not count.
        """
        place = layout.resolve(source)
        return cls(str(source), weights_digest(transformer), _commit(place) if isinstance(place, str) else None)


def _commit(name: str) -> str | None:
    """Commit of the snapshot that the hub's cache holds of a pipeline's transformer."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, f"{layout.TRANSFORMER}/config.json")
    return Path(file).parent.parent.name if isinstance(file, str) else None


def export_adapter(
    transformer: nn.Module,
    folder: str | Path,
    base: str | Path | BaseWeights,
    *,
    card: Card | Mapping[str, Any] | None = None,
    scheduler: Any | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Writes what was trained on top of a base: LoRA, routers and keep schedule, without the base's weights.

    Args:
        transformer: with LoRA (`add_lora_`), converted or not; stays as it is.
        folder: where to; a checkpoint of ours that is there is replaced.
        base: what the transformer was loaded from: a folder, the name of a checkpoint that ships, or a hub id. The
            folder notes it with a digest of the base's weights, and loads on those weights alone.
        card: what is known of it; keys that are left out are filled in from the transformer.
        scheduler: a diffusers scheduler; None makes the one that the card's sampler and objective name.
        dtype: storage type of LoRA; routers stay float32. None keeps what it has.

    Returns:
        The folder. `load_transformer` merges it into its base, peft's `PeftModel.from_pretrained` reads its LoRA part.

    Raises:
        DiffratioError: no LoRA, other kinds of adapters, keep ratios that are still learned, or a folder that is not
            writable or not ours.
    """
    from safetensors.torch import save_file

    peft, storage = require_peft(), as_dtype(dtype)
    backbone, learned, target = backbone_of(transformer), learned_method(transformer), free_folder(folder)
    config = _only_lora(transformer, peft)
    found = base if isinstance(base, BaseWeights) else BaseWeights.of(base, transformer)
    lora = {_PREFIX + key: _stored(value, storage) for key, value in _lora_state(transformer).items()}
    routers = {key: _stored(value, torch.float32) for key, value in _router_state(transformer).items()}
    full_card, scheduler = completed(card, target.name, backbone, learned, transformer, scheduler)
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    settings |= {"inference_mode": True, "base_model_name_or_path": found.source, "revision": found.revision}
    parameters = sum(value.numel() for value in [*lora.values(), *routers.values()])
    schedule = getattr(getattr(learned, "config", None), "schedule", None)
    fraction = learned.macs(schedule.run).fraction if learned is not None and schedule is not None else None
    with atomic_folder(target) as temporary:
        write_json(temporary / CONFIG, settings)
        save_file(lora, temporary / WEIGHTS, metadata={"format": "pt"})
        if routers:
            save_file(routers, temporary / ROUTERS, metadata={"format": "pt"})
        document = {
            "format": FORMAT,
            "version": VERSION,
            "backbone": backbone.name,
            "class": type(transformer).__name__,
            "notes": {note: value for note in NOTES if (value := transformer.config.get(note))},  # type: ignore[union-attr, operator]
            "base": asdict(found) | _relative(found.source, target),
            "method": None if learned is None else config_to_json(learned.config),
            "files": {path.name: sha256(path) for path in sorted(temporary.iterdir())},
        }
        write_json(temporary / layout.ADAPTER, document)
        scheduler.save_config(temporary / layout.SCHEDULER)
        write_json(temporary / layout.CARD, full_card.to_json())
        text = backbone.condition == "text"
        bins = getattr(learned, "bins", None)
        place = layout.resolve(found.source)
        name = place.resolve().name if isinstance(place, Path) else place
        readme = render_readme(full_card, parameters, bins, fraction, text, base=name)
        (temporary / layout.README).write_text(readme, encoding="utf-8")
    return target


def load_adapter(
    folder: Path, dtype: torch.dtype | None = None, base: str | Path | None = None, merge: bool = True
) -> nn.Module:
    """A base with an adapter folder's routing and LoRA, on the CPU.

    Args:
        folder: what `export_adapter` wrote.
        dtype: computing type; routers stay float32. None is float32.
        base: where the base's weights are now; None takes what the folder names.
        merge: whether LoRA is added to the weights; otherwise its layers stay, to be trained on.

    Raises:
        DiffratioError: missing or damaged files, no such base or another one, keys or shapes that do not fit.
    """
    document = adapter_document(folder)
    path = folder / layout.ADAPTER
    for name, digest in document["files"].items():
        if not (folder / name).is_file():
            raise DiffratioError(f"adapter file {str(folder / name)!r} is missing; copy the whole folder")
        if sha256(folder / name) != digest:
            raise DiffratioError(
                f"{str(folder / name)!r} is damaged or was changed: its sha256 is not the one in {str(path)!r}"
            )
    require_peft()
    weights = read_weights(folder / WEIGHTS)
    config = stored_lora(folder / CONFIG, weights)
    transformer = _base_transformer(document, folder, base)
    transformer.register_to_config(**notes_in(document.get("notes") or {}))  # type: ignore[operator]
    try:
        if document["method"] is not None:
            apply_(transformer, stored_method(document["method"]))
    except DiffratioError as error:
        raise DiffratioError(f"{str(path)!r}: {error}") from None
    routers = read_weights(folder / ROUTERS) if ROUTERS in document["files"] else {}
    _fill(_router_state(transformer), routers, folder / ROUTERS)
    try:
        inject_(transformer, config)
    except Exception as error:  # of layers that cannot have an adapter
        raise DiffratioError(f"{str(folder / CONFIG)!r} does not fit the base: {first_line(error)}") from None
    expected = {_PREFIX + key: value for key, value in _lora_state(transformer).items()}
    _fill(expected, weights, folder / WEIGHTS)
    if merge:
        merge_lora_(transformer)
    nn.Module.to(transformer, dtype or torch.float32)
    for name, module in transformer.named_modules():
        if name.endswith(".router"):
            module.float()
    return transformer.eval()


def adapter_document(folder: Path) -> dict[str, Any]:
    """The checked content of `diffratio_adapter.json`.

    Raises:
        DiffratioError: it is not one that this release reads.
    """
    path = folder / layout.ADAPTER
    document = read_json(path, "adapter")
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise DiffratioError(f"{str(path)!r} is not {FORMAT!r} version {VERSION}, which this release reads")
    kinds: dict[str, Any] = {"backbone": str, "class": str, "base": dict, "method": (dict, type(None)), "files": dict}
    for key, kind in kinds.items():
        if not isinstance(document.get(key, ...), kind):
            raise DiffratioError(f"{str(path)!r}: {key} is missing or out of place; copy the file again")
    notes = document.get("notes")
    if notes is not None and not isinstance(notes, dict):
        raise DiffratioError(f"{str(path)!r}: notes is out of place; copy the file again")
    if not isinstance(document["base"].get("revision"), str | None):
        raise DiffratioError(f"{str(path)!r}: base.revision is out of place; copy the file again")
    for key in ("source", "sha256"):
        if not isinstance(document["base"].get(key), str):
            raise DiffratioError(f"{str(path)!r}: base.{key} is missing; copy the file again")
    if not {CONFIG, WEIGHTS} <= set(document["files"]) <= {CONFIG, WEIGHTS, ROUTERS}:
        raise DiffratioError(f"{str(path)!r}: files must name {CONFIG}, {WEIGHTS} and, where it is routed, {ROUTERS}")
    return document


def base_place(folder: Path, base: str | Path | None = None) -> Path | str:
    """Where the base of an adapter folder is: a folder, or a hub id.

    Args:
        folder: of the adapter.
        base: where it is now; None takes what the folder names, first as seen from the adapter folder.

    Raises:
        DiffratioError: it is nowhere.
    """
    if base is not None:
        return layout.resolve(base)
    own = adapter_document(folder)["base"]
    if isinstance(own.get("relative"), str) and (beside := folder / own["relative"]).is_dir():
        return Path(os.path.normpath(beside))
    try:
        return layout.resolve(own["source"])
    except DiffratioError:
        raise DiffratioError(
            f"adapter {str(folder)!r} stands on {own['source']!r}, which is not here; correct base.source in its "
            f"{layout.ADAPTER}, or load_transformer(folder, base=...)"
        ) from None


def _relative(source: str, target: Path) -> dict[str, str]:
    """The way from the adapter to a base that is a folder, so that both can move together."""
    place = layout.resolve(source)
    shipped = isinstance(place, Path) and not Path(source).expanduser().exists()
    if not isinstance(place, Path) or shipped:
        return {}
    return {"relative": Path(os.path.relpath(place.absolute(), target)).as_posix()}


def _base_transformer(document: Mapping[str, Any], folder: Path, base: str | Path | None) -> nn.Module:
    from diffratio.checkpoint.load import load_transformer

    place, own = base_place(folder, base), document["base"]
    revision = own.get("revision") if str(place) == own["source"] else None
    transformer = load_transformer(place, torch.float32, revision=revision)
    kind = "routed" if is_applied(transformer) else type(transformer).__name__
    if kind != document["class"]:
        raise DiffratioError(
            f"adapter {str(folder)!r} stands on a dense {document['class']} and {str(place)!r} is {kind}"
        )
    if (found := weights_digest(transformer)) != own["sha256"]:
        raise DiffratioError(
            f"adapter {str(folder)!r} stands on {own['source']!r} with weights {own['sha256'][:12]}, and "
            f"{str(place)!r} has {found[:12]}; give the base that it was trained on: correct base.source in its "
            f"{layout.ADAPTER}, or load_transformer(folder, base=...)"
        )
    return transformer


def _only_lora(transformer: nn.Module, peft: Any) -> Any:
    """The config of the transformer's one LoRA adapter."""
    configs: dict[str, Any] = getattr(transformer, "peft_config", {})
    if not adapter_layers(transformer) or list(configs) != [ADAPTER]:
        what = f"the adapters {', '.join(configs)}" if configs else "no LoRA"
        raise DiffratioError(
            f"an adapter folder holds one LoRA named {ADAPTER!r}, and this transformer has {what}; "
            "diffratio.add_lora_ puts one in, diffratio.export stores everything merged"
        )
    if not isinstance(configs[ADAPTER], peft.LoraConfig):
        raise DiffratioError(
            f"an adapter folder holds LoRA, and this is {configs[ADAPTER].peft_type}; diffratio.export stores it merged"
        )
    return configs[ADAPTER]


def _lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    """peft's state dict, without the adapter's name."""
    from peft import get_peft_model_state_dict

    # `auto` would look the base up on the hub, for a vocabulary
    return dict(get_peft_model_state_dict(transformer, adapter_name=ADAPTER, save_embedding_layers=False))


def _router_state(transformer: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in transformer.state_dict().items() if ".router." in key}


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.detach().to("cpu", dtype or value.dtype).contiguous()


def _fill(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Copies all stored values into place, and nothing else."""
    if set(expected) != set(state):
        raise DiffratioError(f"weights {str(path)!r} do not fit: {differences(state, expected)}")
    for key, value in expected.items():
        if value.shape != state[key].shape:
            raise DiffratioError(
                f"weights {str(path)!r} do not fit: {key} has shape {tuple(state[key].shape)} and the base asks for "
                f"{tuple(value.shape)}"
            )
    check_values(expected, state, path)
    for key, value in expected.items():
        value.copy_(state[key])
