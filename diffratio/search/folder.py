"""The folder of a search: what defines it, and every evaluation so far. A rerun replays from these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError, shortened
from diffratio.files import read_json, writable_folder, write_json

FORMAT, VERSION, FILE = "diffratio step search", 2, "search.json"


class SearchFolder:
    """Evaluations of one search, by what was evaluated; nothing is written before the first one.

    Args:
        path: the folder.
        definition: plain settings that all of its evaluations share.

    Raises:
        DiffratioError: the folder holds another search, or a damaged one.
    """

    def __init__(self, path: str | Path, definition: Mapping[str, Any]) -> None:
        self.path, self.definition = Path(path), dict(definition)
        self.known: dict[str, float] = {}
        self.timetables: dict[str, list[tuple[int, ...]]] | None = None
        if (self.path / FILE).is_file():
            self.known = self._read()
        elif self.path.is_file():
            raise DiffratioError(f"out={str(self.path)!r} is a file; give a folder")
        self.before = len(self.known)

    def _read(self) -> dict[str, float]:
        file = self.path / FILE
        document = read_json(file, "search")
        try:
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise DiffratioError(f"{str(file)!r} is not a search of this release; choose another out=FOLDER")
            then, known = dict(document["settings"]), {str(k): float(v) for k, v in document["evaluated"].items()}
            self.timetables = {
                str(kind): [tuple(int(step) for step in table) for table in tables]
                for kind, tables in document["timetables"].items()
            }
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if isinstance(error, DiffratioError):
                raise
            raise DiffratioError(f"{str(file)!r} is damaged ({type(error).__name__}); choose another folder") from None
        for key in {**then, **self.definition}:
            if then.get(key) != self.definition.get(key):
                raise DiffratioError(
                    f"{str(self.path)!r} was begun with {key}={shortened(then.get(key), 60)}, now it is "
                    f"{shortened(self.definition.get(key), 60)}; choose another out=FOLDER (generations may be added)"
                )
        if not all(math.isfinite(value) for value in known.values()):
            raise DiffratioError(f"{str(file)!r} is damaged (an error is not finite); choose another folder")
        return known

    def add(self, key: str, error: float) -> None:
        """Keeps an evaluation, at once: a job that is killed loses the one under way."""
        self.known[key] = error
        writable_folder(self.path)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.definition,
            "timetables": self.timetables or {},
            "evaluated": self.known,
        }
        write_json(self.path / FILE, document)
