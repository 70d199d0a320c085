"""Tables of a run that go on where a resumed run left off."""

from __future__ import annotations

import csv
import uuid
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from diffratio.files import atomic_file


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger deletes the rows of an earlier start of the same run; here they stay.

    Args:
        folder: run folder; rows go to `logs/metrics.csv`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="logs", version="", flush_logs_every_n_steps=1)  # a kill must not lose rows
        self.path = folder / "logs" / "metrics.csv"
        self.earlier: list[Any] = _read(self.path)[1] if self.path.is_file() else []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, with the earlier rows put back."""
        writer: Any = super().experiment
        if self.earlier:
            writer.metrics, self.earlier = self.earlier + writer.metrics, []
            writer.save()
        return writer

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops the rows from a step on: they are about to be computed anew."""
        rewind_table(self.path, step - 1)


class RunWandbLogger(WandbLogger):
    """Lightning's wandb logger begins another run at every start; here a resumed job goes on in its own.

    Args:
        folder: run folder; `wandb-id.txt` in it holds the id.
        settings: of the logger; an `id` among them counts.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.path = folder / "wandb-id.txt"
        known = self.path.read_text(encoding="ascii").strip() if self.path.is_file() else ""
        given = {"save_dir": folder, "id": known or uuid.uuid4().hex[:12]} | settings
        super().__init__(**cast(dict[str, Any], given))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """wandb's run; its id is kept from the first one on."""
        if self._experiment is None and not self.path.is_file():
            with atomic_file(self.path) as temporary:
                temporary.write_text(f"{self._id}\n", encoding="ascii")
        return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends wandb's run too: the next job of this process would go on in it."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


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
