"""The data sets that ship inside the package; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from diffratio.errors import unknown

_SETS = {
    "fashion_mnist": "Fashion-MNIST, balanced part: 20,000 + 5,000 held-out 28x28 grey images, 10 classes (MIT)",
    "emoji64": "emoji64: 6,212 + 317 + 403 captioned 64x64 colour emoji in 4 styles (Apache-2.0, CC-BY 4.0, MIT)",
}


def embedded_sets() -> dict[str, str]:
    """Name and one-line description of every embedded set."""
    return dict(_SETS)


def embedded_folder(name: str) -> Path:
    """Folder of an embedded set: one parquet file a split, its licence and its attribution.

    Raises:
        DiffratioError: no embedded set of this name.
    """
    if name not in _SETS:
        raise unknown("embedded data set", name, _SETS)
    return Path(__file__).parent / name
