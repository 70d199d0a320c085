"""The report's tables: figures in words, with their intervals, ready for any template."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffratio.evaluation.records import Record
from diffratio.evaluation.summary import Figure, Group, Row, better, timing_key
from diffratio.evaluation.verdicts import flags_of

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the figure, smaller lines under it, and whether it is clearly the best of its group."""

    text: str
    details: tuple[str, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a table of figures.

    Args:
        name: heading.
        unit: smaller line under it.
        metric: name in `Row.figures`.
        decimals: digits after the point; None takes three significant ones of the largest figure.
        signed: whether a plus is written.
        scale: what figures are multiplied by.
        hint: what the metric is, in one line.
        deviation: whether the standard error is shown instead of the interval.
    """

    name: str
    unit: str
    metric: str
    decimals: int | None = None
    signed: bool = False
    scale: float = 1.0
    hint: str = ""
    deviation: bool = False


# Headings and digits of metrics that have better ones than their name gives; any other metric of the registry is shown
# under its name, with its description as the hint.
KNOWN = {
    "kid_lite0": Column("KID", "× 1000, interval", "kid_lite0", 2),
    "kid_lite0_vs_dense": Column("KID to dense", "× 1000, paired", "kid_lite0_vs_dense", 2, True),
    "excess_loss": Column("Excess loss", "× 1000, ± standard error", "excess_loss", 2, True, 1e3, deviation=True),
    "psnr": Column("PSNR", "to dense, dB", "psnr", 1),
    "fd_lite0": Column("FD", "lite0", "fd_lite0", 2),
    "ssim": Column("SSIM", "to dense", "ssim", 3),
    "feature_distance": Column("Feature distance", "to dense", "feature_distance"),
}
FIRST = ("kid_lite0", "kid_lite0_vs_dense", "excess_loss", "class_accuracy", "caption_retrieval")
COSTS = ("fraction", "macs", "peak_memory_mib")


def metric_columns(groups: Sequence[Group]) -> list[Column]:
    """One column for every quality metric that any arm has: the deciding ones first, then the registry's order."""
    from diffratio.evaluation.metrics import METRICS

    present = {metric for g in groups for row in g.rows for record in row.measured for metric in record.quality}
    present &= {metric for group in groups for row in group.rows for metric in row.figures}
    order = [*FIRST, *METRICS, *sorted(present)]
    columns = []
    for metric in dict.fromkeys(name for name in order if name in present):
        known = KNOWN.get(metric, Column(metric.replace("_", " ").capitalize(), "", metric))
        known_better = better(metric)
        hint = METRICS[metric].description if metric in METRICS else f"{metric}, not in this version's registry"
        unit = known.unit or (f"{known_better} is better" if known_better else "")
        columns.append(replace(known, unit=unit, hint=hint))
    return columns


def summary_columns(groups: Sequence[Group], times: Sequence[tuple[int, str]]) -> list[Column]:
    """Cost, deciding metrics and times."""
    columns = [Column("MACs", "of dense", "fraction", 3, hint="multiply-accumulates of the whole run")]
    columns += [column for column in metric_columns(groups) if column.metric in (*FIRST, "psnr")]
    for batch, mode in times:
        columns.append(Column("Time", f"of dense, batch {batch}, {mode}", timing_key("ratio", batch, mode), 2))
        hint = "share of the saved MACs that became saved time"
        columns.append(
            Column("Efficiency", f"batch {batch}, {mode}", timing_key("efficiency", batch, mode), 2, hint=hint)
        )
    return _present(groups, columns)


def detail_columns(groups: Sequence[Group], times: Sequence[tuple[int, str]]) -> list[Column]:
    """Every other metric, absolute costs and times."""
    columns = [column for column in metric_columns(groups) if column.metric not in (*FIRST, "psnr")]
    columns += [
        Column("MACs", "× 10⁹", "macs", 2, scale=1e-9),
        Column("Peak memory", "MiB", "peak_memory_mib", 0),
    ]
    columns += [Column("Time", f"ms, batch {b}, {mode}", timing_key("ms", b, mode), 1) for b, mode in times]
    return _present(groups, columns)


def _present(groups: Sequence[Group], columns: Iterable[Column]) -> list[Column]:
    """The columns that any arm has a figure for; MACs always stand."""
    found = {metric for group in groups for row in group.rows for metric in row.figures}
    return [column for column in columns if column.metric in found or column.metric == "fraction"]


def figures_table(groups: Sequence[Group], columns: Sequence[Column]) -> dict[str, Any]:
    """All groups over the same columns, ready for a template."""
    digits = {column.metric: _decimals(groups, column) for column in columns}
    bodies = []
    for group in groups:
        # Costs were asked for, not won; absolute times repeat the ratio.
        marked = [
            c.metric for c in columns if c.metric not in COSTS and not c.metric.startswith(("ms,", "efficiency,"))
        ]
        winners = {metric: group.winner(metric) for metric in marked}
        rows = []
        for row in group.rows:
            cells = [
                _cell(row.figures.get(c.metric), c, digits[c.metric], winners.get(c.metric) == row.name)
                for c in columns
            ]
            warnings = list(dict.fromkeys(flag for record in row.measured for flag in flags_of(record)))
            rows.append({"row": row, "weights": _weights(row), "note": _note(row), "cells": cells, "flags": warnings})
        name = "Dense budget" if group.budget == 1 else f"{100 * group.budget:g} % of the dense MACs"
        bodies.append({"name": name, "rows": rows})
    return {"columns": columns, "groups": bodies}


def summary_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One flat row an arm and budget: means over seeds with interval, spread, number of seeds and marks, unrounded."""
    rows = []
    for group in groups:
        for row in group.rows:
            flat: dict[str, Any] = {
                "arm": row.name,
                "budget": row.budget,
                "weights": _weights(row),
                "seeds": " ".join(str(record.seed) for record in row.measured),
                "missing_seeds": " ".join(str(record.seed) for record in row.missing),
                "n": row.record.n,
                "flags": "; ".join(dict.fromkeys(flag for record in row.measured for flag in flags_of(record))),
            }
            for metric, figure in row.figures.items():
                flat[metric] = figure.value
                for part in ("low", "high", "spread"):
                    flat[f"{metric}.{part}"] = getattr(figure, part)
            flat["best_in"] = "; ".join(m for m in row.figures if m not in COSTS and group.winner(m) == row.name)
            rows.append({key: value for key, value in flat.items() if value is not None})
    return rows


def _decimals(groups: Sequence[Group], column: Column) -> int:
    if column.decimals is not None:
        return column.decimals
    figures = [row.figures[column.metric] for group in groups for row in group.rows if column.metric in row.figures]
    largest = max(abs(figure.value * column.scale) for figure in figures)
    return 3 if largest == 0 else min(6, max(0, 2 - math.floor(math.log10(largest))))


def _cell(figure: Figure | None, column: Column, decimals: int, best: bool) -> Cell:
    if figure is None:
        return Cell(DASH)
    scale, signed = column.scale, column.signed
    text = _number(figure.value * scale, decimals, signed)
    details = []
    if column.deviation and figure.stderr is not None:
        details.append(f"± {_number(figure.stderr * scale, decimals)}")
    elif figure.interval is not None:
        low, high = (_number(end * scale, decimals, signed) for end in figure.interval)
        details.append(f"{low} to {high}")
    if figure.spread is not None and column.metric not in COSTS:
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
    if any(record.cost.get("measured") for record in row.measured):
        rates = [record.cost.get("cache", {}).get("hit_rate") for record in row.measured]
        known = [rate for rate in rates if rate is not None]
        rate = f", hit rate {sum(known) / len(known):.2f}" if known else ""
        notes.append(f"MACs measured on its samples{rate}")
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
