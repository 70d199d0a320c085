"""Bounds of what a configuration from elsewhere may ask for, before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffratio.errors import DiffratioError

_LARGEST = 1 << 20  # of any number in a configuration
_BLOCKS = 1000  # of all kinds together
_WIDTH = 1 << 16  # channels of a token
_POSITIONS = 1 << 28  # numbers in a table of positions, which is made in memory even where weights are not


def check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Refuses sizes that no transformer has.

    Args:
        config: of a diffusers transformer.
        path: its file, for the message.

    Raises:
        DiffratioError: names the key, its value and the largest that is taken.
    """
    numbers = {key: value for key, value in config.items() if type(value) in (int, float)}
    for key, value in numbers.items():
        if not abs(value) <= _LARGEST:  # NaN is not either
            raise DiffratioError(f"{str(path)!r}: {key} is {value!r:.40}, and at most {_LARGEST:,} is taken")
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


def check_shapes(skeleton: nn.Module, state: Mapping[str, Tensor], config: Path, weights: Path) -> None:
    """Refuses a configuration that asks for more numbers than its weights file holds.

    Args:
        skeleton: made from the configuration on the meta device.
        state: what the file holds.
        config: file of the configuration, for the message.
        weights: file of the weights, for the message.

    Raises:
        DiffratioError: names both and how many each has.
    """
    asked = sum(value.numel() for value in skeleton.state_dict().values())
    held = sum(value.numel() for value in state.values())
    if asked > 2 * held + _LARGEST:  # what does not fit by less is named key by key later
        raise DiffratioError(
            f"{str(config)!r} asks for {asked:,} numbers and {str(weights)!r} holds {held:,}: they do not go together"
        )
