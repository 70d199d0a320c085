"""What the figures say, in sentences: who is best, what is missing, and what a reader must not overlook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffratio.evaluation.records import Record
from diffratio.evaluation.summary import RANKED, Figure, Group, Row, ranked_metric, summarise


@dataclass(frozen=True)
class Gap:
    """Records of one arm at one budget that hold no figures, or do not exist.

    Args:
        arm: its name.
        budget: fraction of the dense MACs that was asked for.
        seeds: the seeds concerned.
        status: `unreachable`, `failed`, `cancelled`, or `no record`.
        message: why.
    """

    arm: str
    budget: float
    seeds: tuple[int, ...]
    status: str
    message: str


def flags(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """What the records flag, each with the arms and budgets that carry it, in the order of first appearance."""
    found: dict[str, list[str]] = {}
    for record in records:
        for flag in flags_of(record):
            who = f"{record.arm.name} at {record.budget:g}"
            if who not in found.setdefault(flag, []):
                found[flag].append(who)
    return list(found.items())


def flags_of(record: Record) -> tuple[str, ...]:
    """The record's own warnings, as text."""
    return tuple(str(flag) for flag in getattr(record, "flags", None) or ())


def gaps(records: Sequence[Record]) -> list[Gap]:
    """What was asked for and gave no figures, and which cells of arm x budget x seed have no record at all.

    Every arm is expected at every budget below 1 and with every seed; an arm that only exists at the dense budget
    (`dense`, `dense_finetuned`) is expected there alone.
    """
    found: dict[tuple[str, float, str, str], list[int]] = {}
    for record in records:
        if record.status != "ok":
            message = record.message or "no message was recorded"
            found.setdefault((record.arm.name, record.budget, record.status, message), []).append(record.seed)
    seeds = sorted({record.seed for record in records})
    reduced = sorted({record.budget for record in records if record.budget < 1}, reverse=True)
    present = {(record.arm.name, record.budget, record.seed) for record in records}
    for arm in dict.fromkeys(record.arm.name for record in records):
        own = {budget for name, budget, _ in present if name == arm}
        for budget in sorted(own | set(reduced) if own != {1.0} else own, reverse=True):
            missing = [seed for seed in seeds if (arm, budget, seed) not in present]
            if missing:
                why = "this arm was not run at this budget" if budget not in own else "not run with these seeds"
                found.setdefault((arm, budget, "no record", why), []).extend(missing)
    listed = [Gap(arm, budget, tuple(sorted(who)), *rest) for (arm, budget, *rest), who in found.items()]
    return sorted(listed, key=lambda gap: (gap.status == "no record", -gap.budget, gap.arm))


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
    off = []
    for record in measured:
        fraction = record.cost.get("fraction")
        if fraction is not None and not record.budget - 0.01 - 1e-6 <= fraction <= record.budget + 1e-6:
            off.append(
                f"{record.arm.name} costs {fraction:.3f} of the dense MACs, off its budget of {record.budget:g}."
            )
    found += dict.fromkeys(off)
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
    deciding = group.deciding(metric)
    name = next(iter(deciding))
    best, row = figures[name], next(row for row in group.rows if row.name == name)
    ending = f"{_against_dense(row)}{tail}"
    shown = f"{name} has the lowest {RANKED[metric]} ({_span(best)}; {_sample(row)})"
    if len(figures) == 1:
        what = f"its {RANKED[metric]} is {_span(best)}; {_sample(row)}"
        return f"{place} {name} is the only arm measured: {what}.{ending}"
    rivals = group.rivals(metric)
    if not rivals:
        second = list(deciding)[1]
        which = "its interval" if deciding == figures else "paired on equal noise it"
        return f"{place} {shown}, and {which} lies clear of the next best, {second} ({_span(figures[second])}).{ending}"
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
