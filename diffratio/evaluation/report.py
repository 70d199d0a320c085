"""The report of a comparison: one HTML file that works offline, the same in Markdown, and tables as CSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError
from diffratio.evaluation import plots
from diffratio.evaluation.records import Record, read_records
from diffratio.evaluation.summary import summarise
from diffratio.evaluation.tables import summary_rows
from diffratio.evaluation.view import make_view
from diffratio.files import atomic_file, atomic_folder, writable_folder

COMPACT_LIMIT = 3_000_000  # bytes of a report that is to be checked into a repository


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report; `compact` is None where that form was not asked for."""

    html: Path
    markdown: Path
    csv: Path
    summary: Path
    compact: Path | None = None


def write_report(folder: str | Path, title: str = "Comparison", compact: bool = False) -> ReportPaths:
    """Writes `report.html`, `report.md` (with its `plots/`), `records.csv` and `summary.csv` into a comparison folder.

    Args:
        folder: a folder with `records/*.json` and the images that they name; nothing else is read.
        title: heading of the report.
        compact: also writes `compact/`, for a repository: Markdown, CSVs, and of the images what fits into 3 MB.

    Returns:
        The paths of the files.

    Raises:
        DiffratioError: no records or broken ones, jinja2 or matplotlib missing, or a folder that cannot be written.
    """
    folder = Path(folder)
    records = read_records(folder)
    try:
        import jinja2
    except ImportError:
        raise DiffratioError("reports need jinja2, which is not installed: pip install diffratio[report]") from None
    view = make_view(folder, records, title)
    loader = jinja2.PackageLoader("diffratio.evaluation")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = jinja2.Environment(  # noqa: S701 - Markdown; `finalize` escapes what comes from data
        loader=loader, autoescape=False, finalize=_markdown, trim_blocks=True, lstrip_blocks=True
    )
    text.filters["verbatim"] = _Verbatim
    for environment in (page, text):
        environment.undefined = jinja2.StrictUndefined
    html = page.get_template("report.html.j2").render(**view)
    template = text.get_template("report.md.j2")

    writable_folder(folder)
    paths = ReportPaths(
        folder / "report.html", folder / "report.md", folder / "records.csv", folder / "summary.csv",
        folder / "compact" / "report.md" if compact else None,
    )  # fmt: skip
    for place, content in _drawn(view).items():
        _write(folder / place, content)
    _write(paths.markdown, template.render(**view, left_out=0))
    _write_csv(paths.csv, [_flat(record) for record in records])
    _write_csv(paths.summary, summary_rows(summarise(records)))
    if paths.compact is not None:
        _write_compact(folder, paths, view, template)
    _write(paths.html, html)
    return paths


def _drawn(view: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that the report draws itself, by path."""
    drawn = {plot.path: plots.standalone(plot.svg).encode() for plot in view["plots"]}
    return drawn | {figure.path: figure.png for figure in view["figures"]}


def _write_compact(folder: Path, paths: ReportPaths, view: Mapping[str, Any], template: Any) -> None:
    """The Markdown with those images that fit; masks come last, and grids of single arms are left out altogether."""
    assert paths.compact is not None
    drawn = _drawn(view)
    images = drawn | {mask.path: (folder / mask.path).read_bytes() for mask in view["masks"] if mask.uri}
    room = COMPACT_LIMIT - sum(path.stat().st_size for path in (paths.markdown, paths.csv, paths.summary))
    kept: dict[str, bytes] = {}
    for name, content in images.items():
        if len(content) <= room:
            kept[name] = content
            room -= len(content)

    def fitting(items: Sequence[Any]) -> list[Any]:
        return [item for item in items if item.path in kept]

    shown = {key: fitting(view[key]) for key in ("equal", "pareto", "heat_maps", "regions", "figures", "masks")}
    key = view["bin_legend"] if view["bin_legend"] and view["bin_legend"].path in kept else None
    compact = {**view, **shown, "bin_legend": key, "samples": [], "left_out": len(images) - len(kept)}
    with atomic_folder(paths.compact.parent) as place:
        for name, content in kept.items():
            _write(place / name, content)
        for path in (paths.csv, paths.summary):
            _write(place / path.name, path.read_bytes())
        _write(place / paths.compact.name, template.render(**compact))


class _Verbatim(str):
    """Text that is Markdown already."""


def _markdown(value: Any) -> Any:
    """Keeps data from being read as Markdown, HTML or a table's edge."""
    if not isinstance(value, str) or isinstance(value, _Verbatim):
        return value
    value = re.sub(r"\s*[\r\n]+\s*", " ", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", value)


def _write(path: Path, content: str | bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
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
