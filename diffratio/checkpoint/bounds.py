"""Bounds of what files from elsewhere may ask for, before anything is allocated or imported for it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffratio.errors import DiffratioError, shortened

_LARGEST = 1 << 20  # of any number in a configuration
_BLOCKS = 1000  # of all kinds together
_WIDTH = 1 << 16  # channels of a token
_POSITIONS = 1 << 27  # numbers in a table of positions, which is made in memory even where weights are not
_TIMESTEPS = 1 << 16  # that a scheduler holds tables of


def check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Refuses sizes that no transformer has.

    Args:
        config: of a diffusers transformer.
        path: its file, for the message.

    Raises:
        DiffratioError: names the key, its value and the largest that is taken.
    """
    for key, value in _numbers(config):
        if not abs(value) <= _LARGEST:  # NaN is not either
            raise DiffratioError(f"{str(path)!r}: {key} is {value!r:.40}, and at most {_LARGEST:,} is taken")
    numbers = {key: value for key, value in config.items() if type(value) in (int, float)}
    for key, value in numbers.items():
        if value < 0 and type(value) is int:
            raise DiffratioError(f"{str(path)!r}: {key} is {value}, and no transformer counts below 0")
    blocks = sum(value for key, value in numbers.items() if key.endswith("layers"))
    width = numbers.get("num_attention_heads", 1) * numbers.get("attention_head_dim", 1)
    patch = max(1, numbers.get("patch_size", 1))
    side = max(numbers.get("sample_size", 0) // patch, numbers.get("pos_embed_max_size", 0))
    for what, found, most in (
        ("blocks", blocks, _BLOCKS),
        ("channels of a token", width, _WIDTH),
        ("numbers in its table of positions", side * side * width, _POSITIONS),
    ):
        if found > most:
            raise DiffratioError(f"{str(path)!r} asks for {found:,} {what}, and at most {most:,} are taken")


def check_shapes(skeleton: nn.Module, held: int, config: Path, weights: Path) -> None:
    """Refuses a configuration that asks for more numbers than its weights file holds.

    Args:
        skeleton: made from the configuration on the meta device.
        held: how many numbers the file holds.
        config: file of the configuration, for the message.
        weights: file of the weights, for the message.

    Raises:
        DiffratioError: names both and how many each has.
    """
    asked = sum(value.numel() for value in skeleton.state_dict().values())
    if asked > 2 * held + _LARGEST:  # what does not fit by less is named key by key later
        raise DiffratioError(
            f"{str(config)!r} asks for {asked:,} numbers and {str(weights)!r} holds {held:,}: they do not go together"
        )


def check_scheduler(config: Mapping[str, Any], path: Path, kind: type | None = None) -> None:
    """Refuses a scheduler whose tables would be of any length, or whose settings are of another type than usual.

    Args:
        config: as diffusers wrote it.
        path: its file, for the message.
        kind: the scheduler's class, whose defaults say what type a setting has.

    Raises:
        DiffratioError: names the key, its value and what it takes.
    """
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= _TIMESTEPS:
        raise DiffratioError(
            f"{str(path)!r}: num_train_timesteps is {shortened(steps, 40)}; it takes 1 to {_TIMESTEPS:,}"
        )
    for key, value in config.items():
        if isinstance(value, list) and len(value) > _TIMESTEPS:
            raise DiffratioError(
                f"{str(path)!r}: {key} has {len(value):,} entries, and at most {_TIMESTEPS:,} are taken"
            )
    for key, one in inspect.signature(kind).parameters.items() if kind is not None else ():
        usual, value = one.default, config.get(key, one.default)
        if key in config and not _alike(value, usual):
            raise DiffratioError(f"{str(path)!r}: {key} is {shortened(value)}, where {usual!r} is usual")


def _alike(value: Any, usual: Any) -> bool:
    """Whether a setting could stand in place of its default."""
    number = type(value) in (int, float)
    if type(usual) in (int, float):
        return number and (math.isfinite(value) or not math.isfinite(usual))
    if usual is None:
        alone = value is None or number or isinstance(value, str | bool)
        return alone or (isinstance(value, list) and all(type(one) in (int, float) for one in value))
    return isinstance(value, type(usual)) or (usual is inspect.Parameter.empty)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a configuration with their keys, those in lists and objects too."""
    if type(value) in (int, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        if len(value) > _LARGEST:
            raise DiffratioError(f"{key} has {len(value):,} entries, and at most {_LARGEST:,} are taken")
        for inner in value:
            yield from _numbers(inner, key)
