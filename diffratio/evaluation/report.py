"""The report of a comparison: one HTML file that works offline, the same in Markdown, and every record in a CSV."""

from __future__ import annotations

import base64
import csv
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError
from diffratio.evaluation import plots
from diffratio.evaluation.records import Record, read_records
from diffratio.evaluation.summary import (
    RANKED,
    Group,
    headline,
    notices,
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
    provenance_lines,
    summary_columns,
)
from diffratio.files import atomic_file, writable_folder


@dataclass(frozen=True)
class ReportPaths:
    """The three files of a report."""

    html: Path
    markdown: Path
    csv: Path


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


def write_report(folder: str | Path, title: str = "Comparison") -> ReportPaths:
    """Writes `report.html`, `report.md` (with its `plots/`) and `records.csv` into a comparison folder.

    Args:
        folder: a folder with `records/*.json` and the images that they name; nothing else is read.
        title: heading of the report.

    Returns:
        The paths of the three files.

    Raises:
        DiffratioError: no records or broken ones, jinja2 or matplotlib missing, or a folder that cannot be written.
    """
    folder = Path(folder)
    records = read_records(folder)
    try:
        import jinja2
    except ImportError:
        raise DiffratioError("reports need jinja2, which is not installed: pip install diffratio[report]") from None
    view = _view(folder, records, title)
    loader = jinja2.PackageLoader("diffratio.evaluation")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = jinja2.Environment(  # noqa: S701 - Markdown; `finalize` escapes what comes from data
        loader=loader, autoescape=False, finalize=_markdown, trim_blocks=True, lstrip_blocks=True
    )
    text.filters["verbatim"] = _Verbatim
    for environment in (page, text):
        environment.undefined = jinja2.StrictUndefined
    html = page.get_template("report.html.j2").render(**view)
    markdown = text.get_template("report.md.j2").render(**view)

    writable_folder(folder)
    paths = ReportPaths(folder / "report.html", folder / "report.md", folder / "records.csv")
    for plot in view["plots"]:
        _write(folder / plot.path, plots.standalone(plot.svg))
    _write(paths.markdown, markdown)
    _write_csv(paths.csv, records)
    _write(paths.html, html)
    return paths


FEW_TOKENS = 256  # below it a block is so small that launching and gathering weigh as much as what is saved

# what the excess loss is measured from: equally fine-tuned where the comparison had it, otherwise said to be not
REFERENCES = {
    "dense_finetuned": "the dense model with equal fine-tuning (dense_finetuned)",
    "dense": "the dense model as it is, without the fine-tuning that routed arms had",
}


def _view(folder: Path, records: Sequence[Record], title: str) -> dict[str, Any]:
    """Everything the templates show, already in words."""
    groups = summarise(records)
    arms = sorted({record.arm.name for record in records})
    times = timings(record for record in records if record.status == "ok")
    pareto = _pareto_plots(groups, arms, times)
    regions = _region_plots(groups, arms)
    maps = _heat_maps(records)
    legend = Plot("Key to the bins", plots.bin_legend(), "plots/bins.svg") if maps else None
    return {
        "title": title,
        "few_tokens": min((r.run.grid.tokens for r in records if r.run and r.run.grid.tokens < FEW_TOKENS), default=0),
        "reference": REFERENCES["dense_finetuned" if "dense_finetuned" in arms else "dense"],
        "headline": headline(groups),
        "notices": notices(records),
        "ranked": RANKED.get(ranked_metric(groups) or "", "quality"),
        "seeds": len({record.seed for record in records}),
        "summary": figures_table(groups, summary_columns(groups, times)),
        "details": figures_table(groups, detail_columns(groups, times)),
        "widened": any(not record.arm.as_published for record in records),
        "pareto": pareto,
        "heat_maps": maps,
        "bin_legend": legend,
        "regions": regions,
        "plots": [*pareto, *maps, *regions, *([legend] if legend else [])],
        "samples": _samples(folder, groups),
        "masks": _masks(folder, groups),
        "tables": extra_tables(records),
        "missing": [record for record in records if record.status != "ok"],
        "arms": arm_configs(records),
        "provenance": provenance_lines(records),
    }


def _pareto_plots(groups: Sequence[Group], arms: Sequence[str], times: Sequence[tuple[int, str]]) -> list[Plot]:
    metric = ranked_metric(groups)
    if metric is None:
        return []
    quality = {"kid_lite0": "KID × 1000", "excess_loss": "excess loss"}[metric]
    axes = [("macs", "fraction", "MACs of the whole run, fraction of dense")]
    for batch, mode in times:
        axes.append((f"ms-{batch}-{mode}", timing_key("ms", batch, mode), f"milliseconds, batch {batch}, {mode}"))
    found = []
    for key, cost, label in axes:
        points = [
            plots.Point(row.name, row.figures[cost].value, figure.value, figure.low, figure.high)
            for group in groups
            for row in group.rows
            if cost in row.figures and (figure := row.figures.get(metric)) is not None
        ]
        if points:
            name = f"pareto-{_slug(key)}"
            svg = plots.pareto(points, arms, label, f"{quality} (lower is better)", name, spread=key == "macs")
            found.append(Plot(f"{quality} against {label}", svg, f"plots/{name}.svg"))
    return found


def _region_plots(groups: Sequence[Group], arms: Sequence[str]) -> list[Plot]:
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


def _samples(folder: Path, groups: Sequence[Group]) -> list[Picture]:
    """One grid per arm and budget, all of the same seed where the arms share one, so that places correspond."""
    rows = [row for group in groups for row in group.rows if any(r.images.get("samples") for r in row.measured)]
    shown = [[r for r in row.measured if r.images.get("samples")] for row in rows]
    counts: dict[int, int] = {}
    for seed in (record.seed for choice in shown for record in choice):
        counts[seed] = counts.get(seed, 0) + 1
    result = []
    for choice in shown:
        record = min(choice, key=lambda r: (-counts[r.seed], r.seed))
        title = f"{record.arm.name} at {record.budget:g}, seed {record.seed}"
        result.append(_picture(folder, record.images["samples"], title))
    return result


def _masks(folder: Path, groups: Sequence[Group]) -> list[Picture]:
    chosen = [next((r for r in row.measured if r.images.get("masks")), None) for g in groups for row in g.rows]
    return [
        _picture(folder, path, f"{record.arm.name} at {record.budget:g}")
        for record in chosen
        if record is not None
        for path in record.images["masks"]
    ]


def _picture(folder: Path, name: str, title: str) -> Picture:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DiffratioError(f"image {name!r} lies outside the comparison folder {str(folder)!r}; copy it inside")
    if not path.is_file():
        return Picture(title, name, None)
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise DiffratioError(f"image {str(folder / name)!r} is not a PNG; write it again or take it out of its record")
    width, height = struct.unpack(">II", content[16:24])
    return Picture(title, name, f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"


class _Verbatim(str):
    """Text that is Markdown already."""


def _markdown(value: Any) -> Any:
    """Keeps data from being read as Markdown, HTML or a table's edge."""
    if not isinstance(value, str) or isinstance(value, _Verbatim):
        return value
    value = re.sub(r"\s*[\r\n]+\s*", " ", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", value)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_csv(path: Path, records: Sequence[Record]) -> None:
    rows = [_flat(record) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(record: Record) -> dict[str, Any]:
    """One record as one line: nested names joined by dots, timings by batch and mode."""
    document = record.to_json()
    for timing in document["cost"].get("latency") or []:
        name = f"{timing['batch']}.{timing['mode']}"
        document[f"latency.{name}"] = {key: value for key, value in timing.items() if key not in ("batch", "mode")}
    document["cost"] = {key: value for key, value in document["cost"].items() if key != "latency"}
    document["steps"] = None if record.run is None else record.run.steps
    document["created"], document["git"] = (record.provenance.get(key) for key in ("created", "git"))
    for key in ("run", "extra", "provenance", "schedule", "images"):
        document.pop(key)
    flat: dict[str, Any] = {}
    for key, value in document.items():
        _flatten(key, value, flat)
    return {key: value for key, value in flat.items() if value is not None}


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping) and name != "arm.method":
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, into)
    elif isinstance(value, Mapping | list | tuple):
        into[name] = json.dumps(value)
    else:
        into[name] = value
