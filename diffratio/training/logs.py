"""Tables of a run that go on where a resumed run left off."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from diffratio.files import atomic_file


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger deletes the rows of an earlier start of the same run; here they stay.

    Args:
        folder: run folder; rows go to `logs/metrics.csv`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="logs", version="")
        path = folder / "logs" / "metrics.csv"
        self.earlier = _read(path)[1] if path.is_file() else []

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Writes the rows before a step again; those from it on are about to be computed anew."""
        kept: list[Any] = [row for row in self.earlier if int(row["step"]) < step]
        self.experiment.metrics = kept + self.experiment.metrics
        self.experiment.save()


def rewind_table(path: Path, step: int) -> None:
    """Drops the rows of a table that lie after a step; without rows left the file goes."""
    if not path.is_file():
        return
    names, rows = _read(path)
    kept = [row for row in rows if int(row["step"]) <= step]
    if not kept:
        path.unlink()
        return
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, names)
        table.writeheader()
        table.writerows(kept)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and complete rows: the last line of a killed run may be cut short."""
    with open(path, newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        rows = [row for row in reader if (row.get("step") or "").isdecimal() and None not in row.values()]
        return list(reader.fieldnames or ()), rows
