"""What a LoRA job says of its frozen base: where it lies, instead of a copy in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from diffratio.checkpoint import BaseWeights
from diffratio.errors import DiffratioError


def base_weights(source: str | None, transformer: nn.Module) -> BaseWeights | None:
    """The base of a job, before anything is put into it; None for random weights, which no file holds."""
    return BaseWeights.of(source, transformer) if source else None


def leave_base_(checkpoint: dict[str, Any], transformer: nn.Module, base: BaseWeights | None) -> None:
    """Takes the frozen base out of a checkpoint that is being saved, and notes where it lies."""
    if base is None:
        return
    frozen = _frozen(transformer)
    checkpoint["state_dict"] = {key: one for key, one in checkpoint["state_dict"].items() if key not in frozen}
    checkpoint["diffratio"]["base"] = asdict(base)


def put_base_(checkpoint: dict[str, Any], transformer: nn.Module, base: BaseWeights | None) -> None:
    """Puts the frozen base, as it was loaded for this job, into a checkpoint that was saved without it.

    Raises:
        DiffratioError: the job was begun on other weights.
    """
    saved = (checkpoint.get("diffratio") or {}).get("base")
    if saved is None:
        return
    begun = f"this LoRA run was begun on {saved['source']!r} with weights {saved['sha256'][:12]}"
    if base is None:
        raise DiffratioError(f"{begun}; resume with the settings that it was trained with, lora and backbone included")
    if base.sha256 != saved["sha256"]:
        raise DiffratioError(
            f"{begun}, and {base.source!r} now has {base.sha256[:12]}; put the base back, or train anew elsewhere"
        )
    checkpoint["state_dict"] = _frozen(transformer) | checkpoint["state_dict"]


def _frozen(transformer: nn.Module) -> dict[str, Any]:
    parameters = transformer.named_parameters(prefix="transformer")
    return {name: parameter.detach() for name, parameter in parameters if not parameter.requires_grad}
