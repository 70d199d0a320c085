"""From records to figures over seeds: who is best at a budget, and whether that is certain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from diffratio.evaluation.records import Record

QUARTILES_FROM = 4  # repeats; the quartiles of fewer times say nothing of their spread
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
        """The arms that have a metric, best first."""
        found = {row.name: row.figures[metric] for row in self.rows if metric in row.figures}
        sign = -1 if better(metric) == "higher" else 1
        return dict(sorted(found.items(), key=lambda item: sign * item[1].value))

    def deciding(self, metric: str) -> dict[str, Figure]:
        """What separates the arms: paired differences to dense where every arm has one, else the figures; best first.

        Noise that an arm shares with the dense model cancels in a paired difference, so its intervals are narrower.
        """
        figures, paired = self.figures(metric), self.figures(f"{metric}_vs_dense")
        return paired if figures and set(paired) == set(figures) else figures

    def winner(self, metric: str) -> str | None:
        """The arm whose interval lies wholly on the better side of every other arm's; None where no arm's does."""
        figures = self.deciding(metric)
        if len(figures) < 2 or better(metric) is None or self.rivals(metric):
            return None
        return next(iter(figures))

    def rivals(self, metric: str) -> list[str]:
        """The arms that the best one is not told apart from: their interval overlaps its own, or one is unknown."""
        (_, first), *others = self.deciding(metric).items()
        higher = better(metric) == "higher"
        return [name for name, other in others if not (_below(other, first) if higher else _below(first, other))]


def better(metric: str) -> str | None:
    """`lower` or `higher`, from the registry of metrics; times are better lower; None where nothing says."""
    from diffratio.evaluation.metrics import METRICS

    if metric in METRICS:
        return METRICS[metric].better
    kind = metric.split(",")[0]
    return {"ratio": "lower", "ms": "lower", "efficiency": "higher"}.get(kind)


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
    if timing.get("repeats") is not None and timing["repeats"] < QUARTILES_FROM:
        low = high = None
    dense = timing.get("dense_median_ms")
    scale = {"ms": 1.0, "ratio": 1.0 / dense} if dense else {"ms": 1.0}
    times: dict[str, Figure | None] = {
        kind: Figure(median * s, None if low is None else low * s, None if high is None else high * s)
        for kind, s in scale.items()
    }
    return {**times, "efficiency": _estimate(timing.get("efficiency"))}
