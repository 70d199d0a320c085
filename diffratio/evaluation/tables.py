"""The report's tables: figures in words, with their intervals, ready for any template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffratio.evaluation.records import Record
from diffratio.evaluation.summary import Figure, Group, Row, timing_key

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the figure, smaller lines under it, and whether it is clearly the best of its group."""

    text: str
    details: tuple[str, ...] = ()
    best: bool = False


Column = tuple[str, str, str, int, bool]  # heading, unit or note, metric, significant decimals, signed


def summary_columns(groups: Sequence[Group], times: Sequence[tuple[int, str]]) -> list[Column]:
    columns: list[Column] = [
        ("MACs", "of dense", "fraction", 3, False),
        ("KID", "× 1000, interval", "kid_lite0", 2, False),
        ("KID to dense", "paired difference", "kid_lite0_vs_dense", 2, True),
        ("Excess loss", "× 1000, ± standard error", "excess_loss", 2, True),
        ("PSNR", "to dense, dB", "psnr", 1, False),
    ]
    for batch, mode in times:
        columns.append(("Time", f"of dense, batch {batch}, {mode}", timing_key("ratio", batch, mode), 2, False))
        columns.append(("Efficiency", f"batch {batch}, {mode}", timing_key("efficiency", batch, mode), 2, False))
    return _present(groups, columns)


def detail_columns(groups: Sequence[Group], times: Sequence[tuple[int, str]]) -> list[Column]:
    columns: list[Column] = [
        ("FD", "lite0", "fd_lite0", 2, False),
        ("SSIM", "to dense", "ssim", 3, False),
        ("Feature distance", "to dense", "feature_distance", 3, False),
        ("MACs", "× 10⁹", "macs", 2, False),
        ("Peak memory", "MiB", "peak_memory_mib", 0, False),
    ]
    columns += [("Time", f"ms, batch {b}, {mode}", timing_key("ms", b, mode), 1, False) for b, mode in times]
    return _present(groups, columns)


def _present(groups: Sequence[Group], columns: Iterable[Column]) -> list[Column]:
    """The columns that any arm has a figure for; MACs and KID always stand."""
    found = {metric for group in groups for row in group.rows for metric in row.figures}
    return [column for column in columns if column[2] in found or column[2] in ("fraction", "kid_lite0")]


SCALES = {"excess_loss": 1e3, "macs": 1e-9}
# Only what has an interval can be told apart, and only what a reader chooses an arm by is worth a mark.
MARKED = ("kid_lite0", "kid_lite0_vs_dense", "excess_loss")


def figures_table(groups: Sequence[Group], columns: Sequence[Column]) -> dict[str, Any]:
    bodies = []
    for group in groups:
        winners = {c[2]: group.winner(c[2]) for c in columns if c[2] in MARKED or c[2].startswith("ratio")}
        rows = []
        for row in group.rows:
            cells = [
                _cell(row.figures.get(metric), metric, decimals, signed, winners.get(metric) == row.name)
                for _, _, metric, decimals, signed in columns
            ]
            rows.append({"row": row, "weights": _weights(row), "note": _note(row), "cells": cells})
        name = "Dense budget" if group.budget == 1 else f"{100 * group.budget:g} % of the dense MACs"
        bodies.append({"name": name, "rows": rows})
    return {"columns": columns, "groups": bodies}


def _cell(figure: Figure | None, metric: str, decimals: int, signed: bool, best: bool) -> Cell:
    if figure is None:
        return Cell(DASH)
    scale = SCALES.get(metric, 1.0)
    text = _number(figure.value * scale, decimals, signed)
    details = []
    if metric == "excess_loss" and figure.stderr is not None:
        details.append(f"± {_number(figure.stderr * scale, decimals)}")
    elif figure.interval is not None:
        low, high = (_number(end * scale, decimals, signed) for end in figure.interval)
        details.append(f"{low} to {high}")
    if figure.spread is not None and metric not in ("fraction", "macs"):
        details.append(f"s {_number(figure.spread * scale, decimals)}")
    return Cell(text, tuple(details), best)


def _number(value: float, decimals: int, signed: bool = False) -> str:
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.replace("-", "").replace("+", "")
    return text.replace("-", MINUS)


def _weights(row: Row) -> str:
    return ", ".join(dict.fromkeys(record.arm.weights for record in (row.measured or row.missing)))


def _note(row: Row) -> str:
    steps = row.record.arm.finetuned_steps
    notes = [f"{steps} fine-tuning steps"] if steps is not None else []
    if len(row.measured) > 1 or (row.measured and row.missing):
        asked = len(row.measured) + len(row.missing)
        notes.append(f"{len(row.measured)} seeds" if not row.missing else f"{len(row.measured)} of {asked} seeds")
    return ", ".join(notes)


def extra_tables(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The records' own tables, each content once, with the columns in the order in which they first appear."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, table in record.extra.items():
            columns = list(dict.fromkeys(str(key) for row in table["rows"] for key in row))
            rows = [[_value(row.get(column)) for column in columns] for row in table["rows"]]
            headings = [column.removesuffix("_ms").replace("_", " ") for column in columns]
            headings = [h + ", ms" if c.endswith("_ms") else h for h, c in zip(headings, columns, strict=True)]
            entry = {"title": str(table.get("title") or name), "columns": headings, "rows": rows}
            found.setdefault(json.dumps(entry), entry)
    return list(found.values())


def arm_configs(records: Sequence[Record]) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for record in records:
        arm = record.arm
        config = ", ".join(f"{key}={_value(value)}" for key, value in arm.method.items() if key != "name")
        steps = None if record.run is None else record.run.steps
        entry = {
            "arm": arm.name,
            "method": str(arm.method["name"]) + (f" ({config})" if config else ""),
            "budget": f"{record.budget:g}",
            "steps": _value(steps),
            "fine_tuned": DASH if arm.finetuned_steps is None else f"{arm.finetuned_steps} steps",
            "published": "as published" if arm.as_published else "widened to reach the budget",
            "weights": f"{arm.weights}" + (f" (sha256 {arm.weights_sha256[:12]})" if arm.weights_sha256 else ""),
        }
        found.setdefault(json.dumps(entry), entry)
    return list(found.values())


def provenance_lines(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What every figure rests on: one line a fact, all values where the records differ."""

    def values(items: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(_value(item) for item in items if item is not None)) or "not recorded"

    packages = sorted(
        {f"{name} {version}" for r in records for name, version in (r.provenance.get("packages") or {}).items()}
    )
    created = sorted(str(r.provenance["created"]) for r in records if r.provenance.get("created"))
    when = created[0] if created and created[0] == created[-1] else f" {DASH} ".join(created[:1] + created[-1:])
    return [
        ("Records", f"{len(records)}, of which {sum(r.status == 'ok' for r in records)} measured"),
        ("Samples (n)", values(r.n for r in records)),
        ("Seeds", values(sorted(r.seed for r in records))),
        ("Sampler", values(r.sampler for r in records)),
        ("Steps", values(r.run.steps for r in records if r.run is not None)),
        ("Guidance scale", values(r.guidance_scale for r in records)),
        ("Token grid", values(f"{r.run.grid.height} × {r.run.grid.width}" for r in records if r.run is not None)),
        ("Extractor", values(r.provenance.get("extractor") for r in records)),
        ("Device", values(r.provenance.get("device") for r in records)),
        ("Python", values(r.provenance.get("python") for r in records)),
        ("Packages", ", ".join(packages) or "not recorded"),
        ("Git", values(r.provenance.get("git") for r in records)),
        ("Measured", when or "not recorded"),
    ]


def _value(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    if isinstance(value, Mapping | list | tuple):
        text = json.dumps(value)
        return text if len(text) <= 80 else f"{text[:79]}…"
    return str(value)
