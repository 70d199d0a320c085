"""From records to what a reader wants to know: figures over seeds, who is best, and whether that is certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from diffratio.evaluation.records import Record

RANKED = {"kid_lite0": "KID", "excess_loss": "excess loss"}


@dataclass(frozen=True)
class Figure:
    """One quantity of one arm, over its seeds.

    Args:
        value: mean over the seeds.
        low: lower end of the hull of the seeds' 95 % intervals (quartiles for times), or None.
        high: upper end of it, or None.
        spread: standard deviation between the seeds, None for a single one.
        seeds: how many seeds it rests on.
        stderr: mean standard error within a seed, or None.
    """

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    seeds: int = 1
    stderr: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, where both are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Row:
    """One arm at one budget.

    Args:
        name: the arm.
        budget: fraction of the dense MACs that was asked for.
        measured: its records with status `ok`.
        missing: its other records.
        figures: figures by metric; times are named `ratio`, `ms` and `efficiency` with batch and mode.
    """

    name: str
    budget: float
    measured: tuple[Record, ...]
    missing: tuple[Record, ...]
    figures: Mapping[str, Figure]

    @property
    def record(self) -> Record:
        """The record of its first seed, a measured one where there is one."""
        return (self.measured or self.missing)[0]


@dataclass(frozen=True)
class Group:
    """All arms of one budget, best first."""

    budget: float
    rows: tuple[Row, ...]

    def figures(self, metric: str) -> dict[str, Figure]:
        """The arms that have a metric, lowest value first."""
        found = {row.name: row.figures[metric] for row in self.rows if metric in row.figures}
        return dict(sorted(found.items(), key=lambda item: item[1].value))

    def winner(self, metric: str) -> str | None:
        """The arm whose interval lies wholly below every other arm's; None where no arm's does, or there is one arm."""
        figures = self.figures(metric)
        return None if len(figures) < 2 or self.rivals(metric) else next(iter(figures))

    def rivals(self, metric: str) -> list[str]:
        """The arms that the lowest one is not told apart from: their interval overlaps its own, or one is unknown."""
        (_, first), *others = self.figures(metric).items()
        return [name for name, figure in others if not _below(first, figure)]


def _below(first: Figure, second: Figure) -> bool:
    return first.high is not None and second.low is not None and first.high < second.low


def summarise(records: Sequence[Record]) -> list[Group]:
    """Groups records by budget (largest first) and arm, and takes means over seeds."""
    groups = []
    for budget in sorted({record.budget for record in records}, reverse=True):
        here = [record for record in records if record.budget == budget]
        rows = []
        for name in dict.fromkeys(record.arm.name for record in here):
            mine = sorted((record for record in here if record.arm.name == name), key=lambda r: r.seed)
            measured = tuple(record for record in mine if record.status == "ok")
            missing = tuple(record for record in mine if record.status != "ok")
            rows.append(Row(name, budget, measured, missing, _figures(measured)))
        rows.sort(key=lambda row: (not row.measured, _rank(row), row.name))
        groups.append(Group(budget, tuple(rows)))
    return groups


def ranked_metric(groups: Iterable[Group]) -> str | None:
    """The metric that decides: the first of `RANKED` that any arm has."""
    present = {metric for group in groups for row in group.rows for metric in row.figures}
    return next((metric for metric in RANKED if metric in present), None)


def timings(records: Iterable[Record]) -> list[tuple[int, str]]:
    """The (batch, mode) pairs that were timed, eager first."""
    found = {(int(t["batch"]), str(t["mode"])) for r in records for t in r.cost.get("latency") or []}
    return sorted(found, key=lambda pair: (pair[1] != "eager", pair[1], pair[0]))


def timing_key(kind: str, batch: int, mode: str) -> str:
    """Name of a time in `Row.figures`."""
    return f"{kind}, batch {batch}, {mode}"


def region_losses(row: Row) -> list[Figure]:
    """Excess loss per region, cleanest first, over seeds; empty where it was not measured."""
    found = [record.quality.get("excess_loss_regions") for record in row.measured]
    tables = [table for table in found if isinstance(table, list)]
    if not tables or len({len(table) for table in tables}) != 1:
        return []
    columns = [_mean([_estimate(entry) for entry in column]) for column in zip(*tables, strict=True)]
    return [figure for figure in columns if figure is not None] if None not in columns else []


def headline(groups: Sequence[Group]) -> list[str]:
    """One or two plain sentences for each budget below 1 (or for the dense one, where nothing else was compared)."""
    metric = ranked_metric(groups)
    reduced = [group for group in groups if group.budget < 1] or list(groups)
    return [_verdict(group, metric) for group in reduced]


def notices(records: Sequence[Record]) -> list[str]:
    """What keeps the figures from being comparable, in sentences; empty where nothing does."""
    measured = [record for record in records if record.status == "ok"]
    readers: dict[str, Callable[[Record], Any]] = {
        "number of samples": lambda r: r.n,
        "sampler": lambda r: r.sampler,
        "guidance scale": lambda r: r.guidance_scale,
        "token grid": lambda r: None if r.run is None else f"{r.run.grid.height}x{r.run.grid.width}",
        "extractor": lambda r: r.provenance.get("extractor"),
        "device": lambda r: r.provenance.get("device"),
        "git state": lambda r: r.provenance.get("git"),
    }
    found = []
    for what, read in readers.items():
        values = list(dict.fromkeys(str(value) for record in measured if (value := read(record)) is not None))
        if len(values) > 1:
            found.append(f"The records differ in {what} ({', '.join(values)}): their figures do not compare.")
    for record in measured:
        fraction = record.cost.get("fraction")
        if fraction is not None and not record.budget - 0.01 - 1e-6 <= fraction <= record.budget + 1e-6:
            found.append(f"{record.id} costs {fraction:.3f} of the dense MACs, off its budget of {record.budget:g}.")
    seeds = {frozenset(r.seed for r in row.measured) for group in summarise(records) for row in group.rows}
    if len(seeds - {frozenset()}) > 1:
        found.append("Not every arm was measured with the same seeds; the table says how many stand behind a figure.")
    return found


def _verdict(group: Group, metric: str | None) -> str:
    place = "At the dense budget" if group.budget == 1 else f"At {100 * group.budget:g} % of the dense MACs"
    unmeasured = sum(not row.measured for row in group.rows)
    tail = f" {_count(unmeasured, 'arm')} gave no result there." if unmeasured else ""
    figures = {} if metric is None else group.figures(metric)
    if metric is None or not figures:
        return f"{place} no arm has a measured quality.{tail}"
    name, best = next(iter(figures.items()))
    row = next(row for row in group.rows if row.name == name)
    ending = f"{_against_dense(row)}{tail}"
    shown = f"{name} has the lowest {RANKED[metric]} ({_span(best)}; {_sample(row)})"
    if len(figures) == 1:
        what = f"its {RANKED[metric]} is {_span(best)}; {_sample(row)}"
        return f"{place} {name} is the only arm measured: {what}.{ending}"
    rivals = group.rivals(metric)
    if not rivals:
        second, figure = list(figures.items())[1]
        return f"{place} {shown}, and its interval lies clear of the next best, {second} ({_span(figure)}).{ending}"
    names = _listed(rivals)
    return f"{place} {shown}, but that is not certain: it is not separated from {names}.{ending}"


def _against_dense(row: Row) -> str:
    figure = row.figures.get("kid_lite0_vs_dense")
    if figure is None or figure.interval is None:
        return ""
    low, high = figure.interval
    verdict = "worse than" if low > 0 else "better than" if high < 0 else "not told apart from"
    return f" It is {verdict} the dense model on the same noise (KID difference {_span(figure, signed=True)})."


def _span(figure: Figure, signed: bool = False) -> str:
    value = _number(figure.value, signed)
    if figure.interval is None:
        return value
    low, high = (_number(end, signed) for end in figure.interval)
    return f"{value}, interval {low} to {high}"


def _number(value: float, signed: bool) -> str:
    form = ("+" if signed else "") + (".2f" if value == 0 or abs(value) >= 0.01 else ".2g")
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _sample(row: Row) -> str:
    n = row.record.n
    return _count(len(row.measured), "seed") + (f", n = {n}" if n is not None else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str], most: int = 4) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _rank(row: Row) -> float:
    return next((row.figures[metric].value for metric in RANKED if metric in row.figures), float("inf"))


def _estimate(entry: Any) -> Figure | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        return Figure(float(entry))
    if entry["value"] is None:
        return None
    value, stderr = float(entry["value"]), entry.get("stderr")
    low, high = entry.get("low"), entry.get("high")
    if (low is None or high is None) and stderr is not None:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    return Figure(value, low, high, stderr=stderr)


def _mean(entries: Iterable[Figure | None]) -> Figure | None:
    """Mean over seeds, with the hull of their intervals: it excludes a value only where every seed does."""
    seeds = [entry for entry in entries if entry is not None]
    if not seeds:
        return None
    lows = [entry.low for entry in seeds if entry.low is not None]
    highs = [entry.high for entry in seeds if entry.high is not None]
    errors = [entry.stderr for entry in seeds if entry.stderr is not None]
    whole = len(lows) == len(highs) == len(seeds)
    return Figure(
        value=fmean(entry.value for entry in seeds),
        low=min(lows) if whole else None,
        high=max(highs) if whole else None,
        spread=stdev(entry.value for entry in seeds) if len(seeds) > 1 else None,
        seeds=len(seeds),
        stderr=fmean(errors) if len(errors) == len(seeds) else None,
    )


def _figures(measured: Sequence[Record]) -> dict[str, Figure]:
    columns: dict[str, list[Figure | None]] = {}
    for record in measured:
        for name in ("fraction", "macs", "peak_memory_mib"):
            columns.setdefault(name, []).append(_estimate(record.cost.get(name)))
        for name, entry in record.quality.items():
            if not isinstance(entry, list):
                columns.setdefault(name, []).append(_estimate(entry))
        for timing in record.cost.get("latency") or []:
            for kind, figure in _times(timing).items():
                key = timing_key(kind, int(timing["batch"]), str(timing["mode"]))
                columns.setdefault(key, []).append(figure)
    means = {name: _mean(entries) for name, entries in columns.items()}
    return {name: figure for name, figure in means.items() if figure is not None}


def _times(timing: Mapping[str, Any]) -> dict[str, Figure | None]:
    median, low, high = (timing.get(key) for key in ("median_ms", "q1_ms", "q3_ms"))
    if median is None:
        return {}
    dense = timing.get("dense_median_ms")
    scale = {"ms": 1.0, "ratio": 1.0 / dense} if dense else {"ms": 1.0}
    times: dict[str, Figure | None] = {
        kind: Figure(median * s, None if low is None else low * s, None if high is None else high * s)
        for kind, s in scale.items()
    }
    return {**times, "efficiency": _estimate(timing.get("efficiency"))}
