"""What checkpoint folders say of methods and LoRA, read so that no path, pattern or module of theirs is followed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffratio.errors import DiffratioError, shortened
from diffratio.files import read_json
from diffratio.methods.base import MethodConfig, config_from_json
from diffratio.surgery.adapters import require_peft

_NAME = re.compile(r"[\w.-]+")  # of a layer; anything else would be a pattern
_LARGEST_ALPHA = 1 << 20
_FREE = ("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
_MADE = ("init_lora_weights", "runtime_config")  # how training began, and where it ran: nothing of what was stored


def stored_method(document: Any) -> MethodConfig:
    """The config of a method that a checkpoint folder holds.

    Raises:
        DiffratioError: it is none, or names a file in place of a schedule: a folder is complete in itself.
    """
    if not isinstance(document, Mapping):
        raise DiffratioError(f"method must be an object, got {shortened(document)}")
    if isinstance(document.get("schedule"), str):
        raise DiffratioError(
            f"method.schedule is {shortened(document['schedule'])}; a checkpoint holds it, no file name"
        )
    return config_from_json(document)


def stored_lora(path: Path, weights: Mapping[str, Tensor]) -> Any:
    """The LoRA config of an `adapter_config.json`.

    Only what LoRA of listed layers needs is taken: peft would match regular expressions of any cost, make matrices of
    any rank and import a module that the file names.

    Args:
        path: the file.
        weights: what is stored beside it; no layer has a higher rank than the highest one in there.

    Returns:
        A `peft.LoraConfig`.

    Raises:
        DiffratioError: another kind of adapter, a setting that is not taken, or a value out of bounds; names the file.
    """
    document = read_json(path, "adapter configuration")
    if not isinstance(document, dict) or document.get("peft_type") != "LORA":
        raise DiffratioError(f"{str(path)!r} is no LoRA configuration of peft")
    highest = max((value.shape[0] for key, value in weights.items() if ".lora_A." in key and value.ndim), default=0)
    values: dict[str, Any] = {}

    def refuse(key: str, allowed: str) -> DiffratioError:
        return DiffratioError(f"{str(path)!r}: {key} is {shortened(document.get(key))}; it takes {allowed}")

    def number(value: Any, least: float, most: float) -> bool:
        return type(value) in (int, float) and least <= value <= most

    if type(document.get("r")) is not int or not 1 <= document["r"] <= max(highest, 1):
        raise refuse("r", f"an integer of 1 to the {highest} that the weights have")
    if not number(document.get("lora_alpha"), 0, _LARGEST_ALPHA):
        raise refuse("lora_alpha", f"a number of 0 to {_LARGEST_ALPHA}")
    if not number(document.get("lora_dropout", 0), 0, 1):
        raise refuse("lora_dropout", "a number in [0, 1]")
    targets = document.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(_is_name(one) for one in targets):
        raise refuse("target_modules", "a list of names of layers")
    for key, most in (("rank_pattern", highest), ("alpha_pattern", _LARGEST_ALPHA)):
        pattern = document.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_name(one) and number(x, 0, most) for one, x in pattern.items()):
            raise refuse(key, f"names of layers with numbers of at most {most}")
        values[key] = {re.escape(one): x for one, x in pattern.items()}
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if type(document.get(key, False)) is not bool:
            raise refuse(key, "true or false")
        values[key] = document.get(key, False)
    values |= {key: document[key] for key in ("r", "lora_alpha", "lora_dropout") if key in document}
    usual = require_peft().LoraConfig().to_dict()
    for key, value in document.items():
        if key not in values and key not in (*_FREE, *_MADE, "target_modules"):
            nothing = value is None or value is False or value in ([], {}, "")
            if not nothing and value != usual.get(key):
                raise refuse(key, f"{shortened(usual.get(key))}, as every LoRA that this release reads")
    return require_peft().LoraConfig(target_modules=list(targets), **values)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
