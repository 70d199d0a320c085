"""The comparison's table and picture grids in TensorBoard or wandb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError, unknown
from diffratio.evaluation.compare.measuring import row_of
from diffratio.evaluation.records import Record

LOGGERS = ("tensorboard", "wandb")


def check_logger(logger: Mapping[str, Any] | None) -> None:
    """Raises DiffratioError for a logger that a comparison cannot write to, or that is not installed."""
    if not logger:
        return
    if logger.get("name") not in LOGGERS:
        raise unknown("logger of compare (records.csv is always written; null is none)", logger.get("name"), LOGGERS)
    try:
        _module(str(logger["name"]))
    except ImportError:
        raise DiffratioError(
            f"logger={logger['name']} is not installed: pip install diffratio[{logger['name']}]"
        ) from None


def track(logger: Mapping[str, Any], folder: Path, name: str, records: Sequence[Record]) -> None:
    """Logs one row a record and every picture grid.

    Args:
        logger: `{"name": "wandb", "project", "entity", "offline"}` or `{"name": "tensorboard"}`.
        folder: the comparison folder; what the logger keeps locally goes there too.
        name: of the run.
        records: what is logged.
    """
    (_tensorboard if logger["name"] == "tensorboard" else _wandb)(logger, folder, name, records)


def figures_of(record: Record) -> dict[str, float]:
    """Every number of a record by name: estimates, cost, times."""
    found = {name: entry["value"] for name, entry in record.quality.items() if isinstance(entry, Mapping)}
    found |= {name: record.cost.get(name) for name in ("fraction", "macs", "peak_memory_mib")}
    for timing in record.cost.get("latency") or []:
        place = f"batch{timing['batch']}_{timing['mode']}"
        found |= {f"ms_{place}": timing["median_ms"], f"efficiency_{place}": timing["efficiency"]}
    return {name: float(value) for name, value in found.items() if value is not None}


def _module(name: str) -> Any:
    if name == "tensorboard":
        from torch.utils import tensorboard

        return tensorboard
    import wandb

    return wandb


def _grids(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    named = {record.id: record.images.get("samples") for record in records}
    return {key: folder / path for key, path in named.items() if path and (folder / path).is_file()}


def _tensorboard(logger: Mapping[str, Any], folder: Path, name: str, records: Sequence[Record]) -> None:
    import numpy as np
    from PIL import Image

    with _module("tensorboard").SummaryWriter(str(folder / "logs")) as writer:
        for record in records:
            for key, value in figures_of(record).items():
                writer.add_scalar(f"{record.arm.name}-{100 * record.budget:g}/{key}", value, record.seed)
        for key, path in _grids(folder, records).items():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(f"samples/{key}", pixels, 0, dataformats="HWC")


def _wandb(logger: Mapping[str, Any], folder: Path, name: str, records: Sequence[Record]) -> None:
    wandb = _module("wandb")
    run = wandb.init(
        project=logger.get("project") or "diffratio",
        entity=logger.get("entity"),
        name=name,
        job_type="compare",
        dir=str(folder),
        mode="offline" if logger.get("offline") else "online",
        config={"weights": records[0].arm.weights, "records": len(records)} if records else {},
    )
    try:
        rows = [row_of(record) | figures_of(record) for record in records]
        for row in rows:
            row["flags"] = "; ".join(row["flags"])
            del row["time_fraction"]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])
        pictures = {f"samples/{key}": wandb.Image(str(path)) for key, path in _grids(folder, records).items()}
        run.log({"comparison": table, **pictures})
    finally:
        run.finish()
