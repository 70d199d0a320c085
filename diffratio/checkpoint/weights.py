"""Weights of files: read whole, and refused where they are not what a model can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffratio.errors import DiffratioError, shortened
from diffratio.files import read_json

INDEX_SUFFIX = ".index.json"  # behind the name of weights that lie in several files


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    A header that lies about offsets, shapes or types is found by the library; two tensors of one shape that were
    exchanged cannot be told from others without a digest.

    Raises:
        DiffratioError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DiffratioError(f"weights {str(path)!r} are missing; copy the whole checkpoint folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:  # a type that torch lacks is a KeyError
        raise DiffratioError(f"weights {str(path)!r} are damaged or cut short ({error}); copy the file again") from None


def read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of weights that lie in several files beside their index.

    Raises:
        DiffratioError: no index, one that names files elsewhere, or a file that is missing, damaged or lacks a tensor.
    """
    document = read_json(index, "index of weights")
    places = document.get("weight_map") if isinstance(document, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise DiffratioError(f"{str(index)!r} has no weight_map; copy the whole checkpoint folder")
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise DiffratioError(
                f"{str(index)!r}: {key!r:.80} lies in {shortened(name)}, which must be the name of a .safetensors file "
                "beside it"
            )
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        state = read_weights(index.parent / name)
        wanted = {key for key, place in places.items() if place == name}
        if lacking := sorted(wanted - set(state)):
            raise DiffratioError(
                f"weights {str(index.parent / name)!r} lack {lacking[0]}, which {index.name} puts there"
            )
        found |= {key: state[key] for key in wanted}
    return found


def check_values(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses stored values that a parameter cannot hold: another kind of number, or one that is not finite.

    Args:
        expected: what is filled, by key.
        state: what was stored, of the same keys and shapes.
        path: its file, for the message.

    Raises:
        DiffratioError: names the file and the key.
    """
    for key, value in expected.items():
        stored = state[key]
        if value.is_floating_point() != stored.is_floating_point() or stored.is_complex():
            raise DiffratioError(
                f"weights {str(path)!r} do not fit: {key} is stored as {str(stored.dtype)[6:]} and the model holds "
                f"{str(value.dtype)[6:]}"
            )
        if stored.is_floating_point() and not _finite(stored):
            raise DiffratioError(
                f"weights {str(path)!r} are damaged: {key} holds numbers that are not finite; copy the file again, or "
                "export from a checkpoint before the training went wrong"
            )


def _finite(value: Tensor) -> bool:
    whole = value if value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) else value.float()
    return bool(whole.isfinite().all())
