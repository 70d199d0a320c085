"""Rows of a bench, measured in one interleaved loop, and how they are printed."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffratio.bench.planning import planning_share
from diffratio.bench.settings import BenchSettings
from diffratio.cost.latency import MIB, Timing, interleaved, peak_memory
from diffratio.errors import kind_and_line
from diffratio.evaluation.metrics import efficiency
from diffratio.methods.base import Method


@dataclass(frozen=True)
class Variant:
    """What is timed.

    Args:
        call: does the whole of the work once; None where the variant cannot run.
        macs: its MACs / those of the dense variant.
        dense: name of the variant that it is compared with.
        short: name of the dense variant on k tokens, for the overhead; None where there is none.
        facts: further facts for the row, plain data.
        status: `measured`, or in a word or two why there is no call.
        note: more on that.
        scores: whether efficiency is defined (not for training, whose MACs are others).
        planners: methods whose planning is timed on its own, after the loop.
    """

    call: Callable[[], object] | None
    macs: float | None = None
    dense: str = "dense"
    short: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    status: str = "measured"
    note: str = ""
    scores: bool = True
    planners: Sequence[Method] = ()


@dataclass(frozen=True)
class Row:
    """One line of a bench.

    Args:
        group: what the rows of one interleaved loop share.
        variant: its name there.
        macs: MACs / dense MACs.
        timing: of its repeats; None where nothing was timed.
        time: median over repeats of its time / the dense time of the same repeat; below 1 is faster.
        efficiency: (1 - time) / (1 - macs); 0 = no gain, 1 = all saved arithmetic became saved time.
        overhead: median over repeats of its time / that of the dense variant on k tokens.
        memory_mib: growth of memory over one call.
        planning: time that making plans takes / its whole time; None where it makes none.
        status: `measured`, `derived`, or in a word or two why there is no figure.
        note: more on that.
        facts: further plain data.
    """

    group: str
    variant: str
    macs: float | None = None
    timing: Timing | None = None
    time: float | None = None
    efficiency: float | None = None
    overhead: float | None = None
    memory_mib: float | None = None
    planning: float | None = None
    status: str = "measured"
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speed(self) -> float | None:
        """Dense time / own time: above 1 is faster; for training the throughput ratio."""
        return None if self.time is None else 1 / self.time

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        timing = self.timing
        return {
            "group": self.group,
            "variant": self.variant,
            "status": self.status,
            "note": self.note,
            "macs_fraction": self.macs,
            "median_ms": timing and timing.median_ms,
            "q1_ms": timing and timing.q1_ms,
            "q3_ms": timing and timing.q3_ms,
            "repeats": timing.repeats if timing else 0,
            "time_fraction": self.time,
            "speed": self.speed,
            "efficiency": self.efficiency,
            "overhead": self.overhead,
            "peak_memory_growth_mib": self.memory_mib,
            "planning_fraction": self.planning,
            **self.facts,
        }


def measure(group: str, variants: Mapping[str, Variant], settings: BenchSettings, device: str) -> list[Row]:
    """Times variants against each other in one interleaved loop.

    A variant whose first call fails becomes a row that says so; the others are timed without it. A dense variant that
    fails ends the bench, since nothing could be compared.

    Args:
        group: what the rows share, for their title.
        variants: what is timed, by name.
        settings: repeats and warm-up.
        device: where.

    Returns:
        One row a variant, in the order of `variants`.
    """
    print(f"{group}: {len(variants)} variants, {settings.repeats} repeats", file=sys.stderr, flush=True)
    tried = {name: _tried(one) for name, one in variants.items()}
    for reference in dict.fromkeys(one.dense for one in variants.values()):
        if tried[reference].call is None:
            raise RuntimeError(f"{group}: {reference} failed, so nothing can be compared ({tried[reference].note})")
    calls = {name: one.call for name, one in tried.items() if one.call is not None}
    times = interleaved(calls, settings.repeats, settings.warmup, device)
    memory = {name: memory_growth(call, device) for name, call in calls.items()}
    watched = {name: tried[name].planners for name in calls}
    planning = {name: planning_share(calls[name], methods, device) for name, methods in watched.items() if methods}
    return [
        replace(_row(group, name, one, times), memory_mib=memory[name], planning=planning.get(name))
        if name in times
        else Row(group, name, one.macs, status=one.status, note=one.note, facts=one.facts)
        for name, one in tried.items()
    ]


def _tried(one: Variant) -> Variant:
    """The variant, called once; without its call where that fails."""
    if one.call is None:
        return one
    try:
        one.call()
    except Exception as error:  # whatever a peer or the compiler raises belongs into its row
        return replace(one, call=None, status="failed", note=kind_and_line(error, 160))
    return one


def _row(group: str, name: str, one: Variant, times: Mapping[str, Timing]) -> Row:
    own, itself = times[name], one.dense == name
    time = own.relative_to(times[one.dense])
    scored = one.scores and not itself and one.macs is not None and one.macs < 1
    return Row(
        group,
        name,
        one.macs,
        own,
        time,
        efficiency(time, 1.0, one.macs) if scored and one.macs is not None else None,
        own.relative_to(times[one.short]) if one.short in times else None,  # type: ignore[index]
        status=one.status,
        note=one.note,
        facts=one.facts,
    )


def memory_growth(call: Callable[[], object], device: str) -> float | None:
    """Growth of memory over one call, in MiB; what is held before it, by other variants too, is left out."""
    _trim()
    held = torch.cuda.memory_allocated(device) / MIB if torch.device(device).type == "cuda" else 0.0
    peak = peak_memory(call, device)
    return None if peak is None else max(0.0, peak - held)


def _trim() -> None:
    """Gives freed memory back to the system, so that taking it again shows as growth; glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("MACs", lambda row: _number(row.macs, 3)),
    ("median ms", lambda row: _number(row.timing.median_ms if row.timing else None, 2)),
    ("quartiles ms", lambda row: f"{row.timing.q1_ms:.2f}..{row.timing.q3_ms:.2f}" if row.timing else ""),
    ("time", lambda row: _number(row.time, 3)),
    ("speed", lambda row: _number(row.speed, 3)),
    ("efficiency", lambda row: _number(row.efficiency, 2)),
    ("overhead", lambda row: _number(row.overhead, 3)),
    ("plans", lambda row: "" if row.planning is None else f"{100 * row.planning:.1f} %"),
    ("memory MiB", lambda row: _number(row.memory_mib, 1)),
    ("repeats", lambda row: str(row.timing.repeats) if row.timing else "-"),
    ("status", lambda row: f"{row.status}: {row.note}" if row.note else row.status),
)


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def text(title: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Rows as one aligned table a group; columns without any figure are left out.

    Args:
        title: first line.
        rows: in order; rows of one group stand together.
        notes: lines below.
    """
    lines = [title]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        columns = [("variant", [row.variant for row in members])]
        columns += [(name, cells) for name, cell in _COLUMNS if any(cells := [cell(row) for row in members])]
        widths = [max(len(name), *map(len, cells)) for name, cells in columns]
        left = {"variant", "status"}
        lines += ["", group]
        for at in range(-1, len(members)):
            cells = [name if at < 0 else cells[at] for name, cells in columns]
            pairs = zip(columns, cells, widths, strict=True)
            line = "  ".join(cell.ljust(w) if name in left else cell.rjust(w) for (name, _), cell, w in pairs)
            lines.append(f"  {line}".rstrip())
    return "\n".join([*lines, "", *notes])
