"""Milliseconds of a training job: what its cost table promises, and what its export then reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffratio import surgery
from diffratio.checkpoint import load_transformer
from diffratio.cost.latency import cpu_threads, device_name
from diffratio.cost.table import LatencyTable
from diffratio.files import read_json, write_json
from diffratio.training.module import Training

TABLE_FILE = "cost_table.json"  # the run folder's own copy


def keep_table(plain: dict[str, Any], folder: Path) -> None:
    """Copies the cost table of a budget in milliseconds into the run folder."""
    if plain["budget"]["unit"] == "latency":
        write_json(folder / TABLE_FILE, read_json(plain["budget"]["table"], "budget.table"))


def with_own_table(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the run folder's copy of the table, so that neither resume nor export needs the original."""
    if plain["budget"].get("unit") != "latency" or not (folder / TABLE_FILE).is_file():
        return plain
    return {**plain, "budget": {**plain["budget"], "table": str(folder / TABLE_FILE)}}


def promised(module: Training, table: LatencyTable) -> dict[str, Any]:
    """What the table says of a whole run under the schedule, in milliseconds of its forwards."""
    bins = getattr(module.method, "bins", None)
    fraction = 1.0 if bins is None else module.costs.fraction(bins)
    return {
        "device": table.device,
        "dtype": table.dtype,
        "batch": table.batch,
        "promised_fraction": fraction,
        "promised_ms": table.run_ms(module.run, fraction),
        "promised_dense_ms": table.run_ms(module.run),
    }


@torch.no_grad()
def reached(export: Path, module: Training, table: LatencyTable, device: str, repeats: int = 3) -> dict[str, Any]:
    """What the exported checkpoint takes here, interleaved with the same weights without routing.

    Args:
        export: checkpoint folder that the job wrote.
        module: the job.
        table: its cost table, whose batch, type and threads are used.
        device: where; the promise is of the table's own device.
        repeats: timed runs of each, after one that is not.
    """
    routed, dense = (load_transformer(export, table.dtype, device) for _ in range(2))
    if surgery.is_applied(dense):
        surgery.remove_(dense)
    with cpu_threads(table.threads):
        times = surgery.time_runs({"dense": dense, "routed": routed}, module.run, table.batch, repeats)
        name = device_name(device)
    return {
        "reached_fraction": times["routed"].relative_to(times["dense"]),
        "reached_ms": times["routed"].median_ms,
        "reached_dense_ms": times["dense"].median_ms,
        "reached_on": name,
    }


def in_words(found: dict[str, Any]) -> str:
    """Promise and reach in one line."""
    return (
        f"latency: promised {found['promised_ms']:.1f} of {found['promised_dense_ms']:.1f} ms a run "
        f"({found['promised_fraction']:.3f}, {found['device']}), reached {found['reached_ms']:.1f} of "
        f"{found['reached_dense_ms']:.1f} ms ({found['reached_fraction']:.3f}, {found['reached_on']}); "
        f"forwards of {found['batch']} samples"
    )
