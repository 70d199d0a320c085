"""The index of a diffusers pipeline folder: which classes its parts are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError, shortened, unknown
from diffratio.files import read_json

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "diffratio")  # ours is the routed transformer, which we load ourselves


def read_index(path: Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`, whose parts are classes of diffusers and transformers and nothing else.

    Whatever module such a file names would be imported, and a class that stands for others (`AutoModel`) would run
    code from the folder: neither is taken.

    Raises:
        DiffratioError: no such file, or a part from elsewhere; names both.
    """
    index = read_json(path, "pipeline index")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise DiffratioError(f"{str(path)!r} is no index of a diffusers pipeline: it has no _class_name")
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        kinds = len(value) == 2 and all(isinstance(one, str) and one.isidentifier() for one in value)
        if not kinds or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise DiffratioError(f"{str(path)!r}: {name!r:.80} is {shortened(value)}, not [library, class]")
        library, kind = value
        if library not in LIBRARIES:
            raise DiffratioError(
                f"{str(path)!r}: {name}: {unknown('library', library, LIBRARIES)}; no other is imported"
            )
        if library == "transformers" and kind.startswith("Auto"):
            raise DiffratioError(f"{str(path)!r}: {name} is {kind}, which stands for any class; name the class itself")
    return index
