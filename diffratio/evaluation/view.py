"""Everything that the report's templates show: tables in words, plots, pictures."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError
from diffratio.evaluation import pareto, plots
from diffratio.evaluation.equal_time import equal_time_table
from diffratio.evaluation.pictures import COLUMNS, Strip, first_row, png_bytes, png_size, read_png, sample_figure
from diffratio.evaluation.plots import Look
from diffratio.evaluation.records import Arm, Record
from diffratio.evaluation.summary import (
    RANKED,
    Group,
    Row,
    ranked_metric,
    region_losses,
    summarise,
    timing_key,
    timings,
)
from diffratio.evaluation.tables import (
    arm_configs,
    detail_columns,
    extra_tables,
    figures_table,
    metric_columns,
    provenance_lines,
    summary_columns,
)
from diffratio.evaluation.verdicts import flags, gaps, headline, notices

# What stands beside every learned arm, whether it is trained itself or not.
CONTROLS = (
    "dense_finetuned",
    "fewer_steps",
    "guidance_interval",
    "lite_uncond",
    "mod",
    "hand",
    "measured",
    "block_drop",
    "random_keep",
)


@dataclass(frozen=True)
class Plot:
    """A plot in both of its forms: inline SVG, and the path of a standalone file beside the Markdown."""

    title: str
    svg: str
    path: str


@dataclass(frozen=True)
class Picture:
    """An image of the comparison: a data URI (None where the file is missing), its path, its size in pixels."""

    title: str
    path: str
    uri: str | None
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class SampleRow:
    """One arm in a sample figure."""

    name: str
    note: str
    uri: str


@dataclass(frozen=True)
class SampleFigure:
    """The first samples of every arm at a budget on the same noise, as rows for a page and as one PNG for a file."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[SampleRow, ...]
    png: bytes
    path: str


FEW_TOKENS = 256  # below it a block is so small that launching and gathering weigh as much as what is saved

# what the excess loss is measured from: equally fine-tuned where the comparison had it, otherwise said to be not
REFERENCES = {
    "dense_finetuned": "the dense model with equal fine-tuning (dense_finetuned)",
    "dense": "the dense model as it is, without the fine-tuning that routed arms had",
}


def make_view(folder: Path, records: Sequence[Record], title: str) -> dict[str, Any]:
    """Everything the templates show, already in words.

    Args:
        folder: the comparison folder, for the images that the records name.
        records: at least one.
        title: heading of the report.

    Returns:
        The templates' variables; `plots` and `figures` also become files.
    """
    groups = summarise(records)
    arms = plots.looks({record.arm.name: kind_of(record.arm) for record in sorted(records, key=_arm_order)})
    times = timings(record for record in records if record.status == "ok")
    equal, pareto_plots = _forest_plots(groups, arms), _pareto_plots(groups, arms, times)
    regions = _region_plots(groups, arms)
    maps = _heat_maps(records)
    key = Plot("Key to the bins", plots.bin_legend(), "plots/bins.svg") if maps else None
    figures = _sample_figures(folder, groups)
    return {
        "title": title,
        "few_tokens": min((r.run.grid.tokens for r in records if r.run and r.run.grid.tokens < FEW_TOKENS), default=0),
        "reference": REFERENCES["dense_finetuned" if "dense_finetuned" in arms else "dense"],
        "headline": headline(groups),
        "flags": flags(records),
        "notices": notices(records),
        "ranked": RANKED.get(ranked_metric(groups) or "", "quality"),
        "metrics": metric_columns(groups),
        "seeds": len({record.seed for record in records}),
        "summary": figures_table(groups, summary_columns(groups, times)),
        "details": figures_table(groups, detail_columns(groups, times)),
        "widened": any(not record.arm.as_published for record in records),
        "equal": equal,
        "equal_time": _equal_time(groups, times),
        "pareto": pareto_plots,
        "kinds": list(dict.fromkeys(look.kind for look in arms.values())),
        "heat_maps": maps,
        "bin_legend": key,
        "regions": regions,
        "plots": [*equal, *pareto_plots, *maps, *regions, *([key] if key else [])],
        "figures": figures,
        "samples": _samples(folder, groups),
        "masks": _masks(folder, groups),
        "tables": extra_tables(records),
        "missing": gaps(records),
        "arms": arm_configs(records),
        "provenance": provenance_lines(records),
    }


def kind_of(arm: Arm) -> str:
    """`dense`, `control`, `learned` or `free` (training-free)."""
    from diffratio.methods.base import get_method

    name = str(arm.method["name"])
    if name == "dense":
        return "dense" if arm.name == "dense" else "control"
    if name in CONTROLS:
        return "control"
    try:
        return "learned" if get_method(name).learned else "free"
    except DiffratioError:  # a record of another version, whose methods this one does not know
        return "learned" if arm.finetuned_steps else "free"


def _arm_order(record: Record) -> tuple[int, str]:
    return ("dense", "learned", "control", "free").index(kind_of(record.arm)), record.arm.name


def _quality(metric: str) -> tuple[str, float]:
    """Name of the deciding metric on an axis, and what its figures are multiplied by."""
    return {"kid_lite0": ("KID × 1000", 1.0), "excess_loss": ("excess loss × 1000", 1e3)}[metric]


def _equal_time(groups: Sequence[Group], times: Sequence[tuple[int, str]]) -> dict[str, Any] | None:
    metric = ranked_metric(groups)
    return None if metric is None else equal_time_table(groups, times, metric, *_quality(metric))


def _point(row: Row, x: float, metric: str) -> pareto.Point:
    scale = _quality(metric)[1]
    figure = row.figures[metric]
    low, high = (end * scale for end in figure.interval) if figure.interval else (None, None)
    seeds = [value for record in row.measured if (value := _value_of(record.quality.get(metric))) is not None]
    return pareto.Point(row.name, x, figure.value * scale, low, high, tuple(value * scale for value in seeds))


def _value_of(entry: Any) -> float | None:
    value = entry.get("value") if isinstance(entry, Mapping) else entry
    return None if value is None else float(value)


def _forest_plots(groups: Sequence[Group], arms: Mapping[str, Look]) -> list[Plot]:
    metric = ranked_metric(groups)
    if metric is None:
        return []
    label = f"{_quality(metric)[0]} (lower is better)"
    rows = [row for group in groups for row in group.rows if metric in row.figures]
    dense = next((_point(row, 1.0, metric) for row in rows if arms[row.name].kind == "dense"), None)
    found = []
    for group in groups:
        points = [_point(row, 0.0, metric) for row in group.rows if metric in row.figures]
        if group.budget < 1 and points:
            name = f"equal-{100 * group.budget:g}"
            drawn = pareto.forest(points, arms, label, name, dense)
            found.append(
                Plot(f"{_quality(metric)[0]} at {group.budget:g} of the dense MACs", drawn, f"plots/{name}.svg")
            )
    return found


def _pareto_plots(groups: Sequence[Group], arms: Mapping[str, Look], times: Sequence[tuple[int, str]]) -> list[Plot]:
    metric = ranked_metric(groups)
    if metric is None:
        return []
    quality = _quality(metric)[0]
    axes = [("macs", "fraction", "MACs of the whole run, fraction of dense")]
    for batch, mode in times:
        axes.append((f"ms-{batch}-{mode}", timing_key("ms", batch, mode), f"milliseconds, batch {batch}, {mode}"))
    found = []
    for key, cost, label in axes:
        points = [
            _point(row, row.figures[cost].value, metric)
            for group in groups
            for row in group.rows
            if cost in row.figures and metric in row.figures
        ]
        if points:
            name = f"pareto-{_slug(key)}"
            drawn = pareto.pareto(points, arms, label, f"{quality} (lower is better)", name, spread=key == "macs")
            found.append(Plot(f"{quality} against {label}", drawn, f"plots/{name}.svg"))
    return found


def _region_plots(groups: Sequence[Group], arms: Mapping[str, Look]) -> list[Plot]:
    found = []
    for group in groups:
        series = {
            row.name: [plots.Bar(1e3 * f.value, *(1e3 * end for end in f.interval or ())) for f in losses]
            for row in group.rows
            if row.record.arm.method["name"] != "dense" and (losses := region_losses(row))
        }
        if series:
            name = f"regions-{100 * group.budget:g}"
            svg = plots.region_bars(series, arms, "excess loss × 1000", name)
            found.append(Plot(f"At {group.budget:g} of the dense MACs", svg, f"plots/{name}.svg"))
    return found


def _heat_maps(records: Sequence[Record]) -> list[Plot]:
    found: dict[tuple[str, float, str], tuple[Record, list[int]]] = {}
    for record in records:
        if record.schedule is not None:
            key = (record.arm.name, record.budget, json.dumps(record.schedule["bins"]))
            found.setdefault(key, (record, []))[1].append(record.seed)
    result = []
    for index, ((arm, budget, _), (record, seeds)) in enumerate(found.items()):
        several = sum(key[:2] == (arm, budget) for key in found) > 1
        title = f"{arm} at {budget:g}" + (f", seed {', '.join(map(str, seeds))}" if several else "")
        assert record.schedule is not None
        svg = plots.heat_map(record.schedule["bins"], f"keep{index}", f"Keep schedule of {title}")
        result.append(Plot(title, svg, f"plots/keep-{record.id}.svg"))
    return result


def _shown_seed(rows: Sequence[Row]) -> dict[str, Record]:
    """A measured record with samples of each row, all of the same seed where the rows share one."""
    shown = [[record for record in row.measured if record.images.get("samples")] for row in rows]
    counts: dict[int, int] = {}
    for seed in (record.seed for choice in shown for record in choice):
        counts[seed] = counts.get(seed, 0) + 1
    best = (min(choice, key=lambda r: (-counts[r.seed], r.seed)) for choice in shown if choice)
    return {record.id: record for record in best}


def _sample_figures(folder: Path, groups: Sequence[Group]) -> list[SampleFigure]:
    """For every budget: the dense arms on top, and below them its arms, on the same noise in each column.

    An arm whose samples are of another seed, or no such grid, is left to its own grid further down.
    """
    dense = [row for group in groups if group.budget == 1 for row in group.rows]
    dense.sort(key=lambda row: row.name != "dense")
    found = []
    for group in [group for group in groups if group.budget < 1] or groups:
        rows = dense if group.budget == 1 else [*dense, *group.rows]
        records = list(_shown_seed(rows).values())
        records = [record for record in records if record.seed == records[0].seed]
        strips: list[tuple[Strip, Record]] = []
        for record in records:
            content = read_png(folder, record.images["samples"])
            columns = min(COLUMNS, int(record.n or COLUMNS))
            image = first_row(content, columns) if content else None
            if image is not None and (not strips or image.size == strips[0][0].image.size):
                fraction = record.cost.get("fraction")
                note = "" if fraction is None else f"{fraction:.3f} of the MACs"
                strips.append((Strip(record.arm.name, note, image), record))
        if not strips:
            continue
        columns = min(COLUMNS, int(strips[0][1].n or COLUMNS))
        heads = tuple(str(label) for label in (strips[0][1].images.get("labels") or [])[:columns])
        name = f"samples-{100 * group.budget:g}"
        lines = tuple(SampleRow(strip.name, strip.note, _uri(png_bytes(strip.image))) for strip, _ in strips)
        drawn = png_bytes(sample_figure([strip for strip, _ in strips], heads))
        title = f"At {group.budget:g} of the dense MACs, seed {records[0].seed}"
        found.append(SampleFigure(title, heads, lines, drawn, f"plots/{name}.png"))
    return found


def _samples(folder: Path, groups: Sequence[Group]) -> list[Picture]:
    """One grid per arm and budget, all of the same seed where the arms share one, so that places correspond."""
    chosen = _shown_seed([row for group in groups for row in group.rows])
    return [
        _picture(folder, record.images["samples"], f"{record.arm.name} at {record.budget:g}, seed {record.seed}")
        for record in chosen.values()
    ]


def _masks(folder: Path, groups: Sequence[Group]) -> list[Picture]:
    chosen = [next((r for r in row.measured if r.images.get("masks")), None) for g in groups for row in g.rows]
    return [
        _picture(folder, path, f"{record.arm.name} at {record.budget:g}, seed {record.seed}")
        for record in chosen
        if record is not None
        for path in record.images["masks"]
    ]


def _picture(folder: Path, name: str, title: str) -> Picture:
    content = read_png(folder, name)
    if content is None:
        return Picture(title, name, None)
    return Picture(title, name, _uri(content), *png_size(content, name))


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"
