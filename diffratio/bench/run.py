"""Runs one bench from plain config data: device, threads, rows, document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffratio.bench.profiling import in_words
from diffratio.bench.settings import SECTIONS, BenchSettings, check_kind
from diffratio.bench.table import Row, text
from diffratio.cost.latency import cpu_threads
from diffratio.cost.table import LatencyTable
from diffratio.errors import DiffratioError
from diffratio.files import writable_folder, write_json
from diffratio.plain import typed

SCHEMA = 1
FEW = 10
_SHARED = ("repeats", "warmup", "device", "dtype", "threads", "seed", "out")


@dataclass(frozen=True)
class BenchResult:
    """What a bench found.

    Args:
        document: plain data: settings, provenance, rows.
        text: the same as tables.
    """

    document: dict[str, Any]
    text: str


def run_bench(kind: str, cfg: Mapping[str, Any]) -> BenchResult:
    """Runs `routing`, `training`, `methods`, `sampling` or `table`.

    Args:
        kind: which.
        cfg: composed `bench` config as plain data.

    Raises:
        DiffratioError: an unknown bench, bad settings, or a device that is not there.
    """
    settings = typed(BenchSettings, {key: cfg[key] for key in _SHARED if key in cfg}, what="bench")
    own: Any = typed(SECTIONS[check_kind(kind)], cfg[kind], kind)
    device = _device(settings.device)
    if settings.out:
        writable_folder(Path(settings.out).parent)
    with cpu_threads(settings.threads):
        threads = torch.get_num_threads()
        rows, table = _measured(kind, settings, own, device)
        from diffratio.evaluation.records import provenance

        made = provenance(device)
    notes = _notes(kind, settings, device, made["device"])
    notes += [
        f"where the time of {row.variant!r} goes: {in_words(row.facts['profile'])}"
        for row in rows
        if "profile" in row.facts
    ]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "bench": kind,
        "settings": {**asdict(settings), kind: asdict(own)},
        "threads": threads,
        "provenance": made,
        "rows": [row.to_json() for row in rows],
        "notes": notes,
    }
    if table is not None:
        from diffratio.bench.latency import table_notes

        table = replace(table, provenance={key: made[key] for key in ("git", "packages", "python", "created")})
        notes += table_notes(table)
        document["table"] = table.to_json()
    if settings.out:
        write_json(settings.out, document["table"] if table is not None else document)
    return BenchResult(document, text(f"diffratio bench {kind} on {made['device']}", rows, notes))


def _measured(kind: str, settings: BenchSettings, own: Any, device: str) -> tuple[list[Row], LatencyTable | None]:
    """Rows, and for `table` the cost table that they give."""
    if kind != "table":
        return _rows(kind, settings, own, device), None
    from diffratio.bench.latency import bench_table

    return bench_table(settings, own, device, _dtype(settings.dtype, device))


def _rows(kind: str, settings: BenchSettings, own: Any, device: str) -> list[Row]:
    if kind == "training":
        from diffratio.bench.training import bench_training

        return bench_training(settings, own, device)
    if kind == "sampling":
        from diffratio.bench.sampling import bench_sampling

        return bench_sampling(settings, own, device)
    dtype = _dtype(settings.dtype, device)
    if kind == "routing":
        from diffratio.bench.routing import bench_routing

        return bench_routing(settings, own, device, dtype)
    from diffratio.bench.methods import bench_methods

    return bench_methods(settings, own, device, dtype)


def _notes(kind: str, settings: BenchSettings, device: str, name: str) -> list[str]:
    """How the figures came about."""
    clock = "CUDA events on an idle device" if device.startswith("cuda") else "wall clock"
    memory = (
        "allocator's peak less what was held before"
        if device.startswith("cuda")
        else "of the resident set, a lower bound: memory that the process holds already and reuses does not show"
    )
    lines = [
        f"{settings.repeats} timed repeats of every measured row after 1 + {settings.warmup} calls that are not timed, "
        f"all rows of a table interleaved; {clock}; {name}.",
        "time = median over repeats of own / dense time of the same repeat; speed = 1 / time.",
    ]
    if kind != "training":
        lines.append("efficiency = (1 - time) / (1 - MACs): 0 = no gain, 1 = all saved arithmetic became saved time.")
    if kind == "methods":
        lines.append("plans = time that scoring, sorting and matching take / the whole time, in calls of their own.")
    if kind == "routing":
        lines.append("overhead = median over repeats of routed / dense on k tokens, in the same repeat.")
    lines.append(f"memory = growth over one call, {memory}.")
    if settings.repeats < FEW:
        lines.append(f"Fewer than {FEW} repeats: not a figure to report.")
    return lines


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        known = torch.device(name).type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        known = False
    if not known:
        raise DiffratioError(f"device={name!r} is not available here; `diffratio doctor` lists the devices")
    return name


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
