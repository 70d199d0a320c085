"""What a search found, beside uniform schedules: rows, the front's file and its picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError
from diffratio.files import atomic_file, write_json
from diffratio.methods.dato import DaTo
from diffratio.methods.fewer_steps import FewerSteps
from diffratio.methods.step_front import StepFront
from diffratio.methods.step_schedule import COMPUTE, CONTINUE, EXTRAPOLATE, REUSE, SKIP
from diffratio.search.judge import Judge, parts_of
from diffratio.search.settings import SearchSettings

SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the steps that uniform schedules compute
HALF = 0.5  # the budget at which a schedule is taken apart
NAMES = {
    SKIP: "uniform interval",
    EXTRAPOLATE: "uniform interval, extrapolated",
    REUSE: "uniform interval, reused",
    CONTINUE: "uniform interval, outputs extrapolated",
}
FEWER = "uniform fewer steps"


@dataclass(frozen=True)
class Measured:
    """A uniform schedule: its kind, its MACs over the dense run's, and its error on held-out noise."""

    name: str
    fraction: float
    error: float


def baselines(settings: SearchSettings) -> list[tuple[str, DaTo | FewerSteps]]:
    """Uniform intervals with each action that the search has, and fewer steps, at several counts of computed steps."""
    counts = {max(1, round(share * settings.steps)) for share in SHARES} - {settings.steps}
    found: list[tuple[str, DaTo | FewerSteps]] = []
    for count in sorted(counts, reverse=True):
        found.append((FEWER, FewerSteps(keep=count / settings.steps)))
        for action in settings.allowed_actions:
            if action != COMPUTE:
                every = settings.steps / count
                found.append((NAMES[action], DaTo(every=every, ratio=0.0, action=action, mode="cache")))
    return found


def rows(front: StepFront, uniform: Sequence[Measured]) -> list[dict[str, Any]]:
    """Each uniform schedule beside the found one that costs no more; errors are those on held-out noise.

    The found one is chosen by cost alone, so that the held-out noise chooses nothing.
    """
    found = []
    for one in uniform:
        fitting = [entry for entry in front.entries if entry.fraction <= one.fraction + 1e-9]
        entry = fitting[-1] if fitting else None
        own = None if entry is None else entry.held_out_error
        found.append(
            {
                **asdict(one),
                "found_fraction": None if entry is None else entry.fraction,
                "found_error": own,
                "ratio": own / one.error if own is not None and one.error > 0 else None,
            }
        )
    return found


def parts(front: StepFront, judge: Judge, held_out: Callable[[DaTo], float]) -> dict[str, Any] | None:
    """The schedule within half of the dense MACs taken apart: its caching alone and its pruning alone.

    Returns:
        Fraction and held-out error of `both`, `cache` and `prune`; None where it does only one of the two.
    """
    fitting = [entry for entry in front.entries if entry.fraction <= HALF + 1e-9]
    if not fitting:
        return None
    whole = DaTo(schedule=fitting[-1].schedule)
    choices = fitting[-1].schedule.choices
    if not any(one.ratio for one in choices) or all(one.action == COMPUTE for one in choices):
        return None
    split = {config.mode: config for config in (whole, *parts_of(whole))}
    return {mode: {"fraction": judge.fraction(one), "error": held_out(one)} for mode, one in split.items()}


def write_front(
    path: Path,
    front: StepFront,
    definition: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    uniform: Sequence[Measured],
    split: Mapping[str, Any] | None,
) -> None:
    """The file that `dato` and `compare` read, with how it was found."""
    write_json(
        path,
        {
            **front.to_json(),
            "search": dict(definition),
            "uniform": [asdict(one) for one in uniform],
            "against_uniform": [dict(row) for row in compared],
            "parts": split,
        },
    )


def picture(path: Path, front: StepFront, uniform: Sequence[Measured], error: str) -> Path | None:
    """Error against MACs on held-out noise as an SVG file; None without matplotlib."""
    from diffratio.evaluation.pareto import Point, pareto
    from diffratio.evaluation.plots import looks, standalone

    kinds = {"searched": "learned", **{one.name: "control" for one in uniform}}
    points = [Point("searched", one.fraction, one.held_out_error or 0.0) for one in front.entries]
    points += [Point(one.name, one.fraction, one.error) for one in uniform]
    unit = "features" if error == "features" else "images in [-1, 1]"
    try:
        drawn = pareto(
            points, looks(kinds), "MACs over the dense run's", f"squared distance to the dense {unit}", "front"
        )
    except DiffratioError:
        return None
    with atomic_file(path) as temporary:
        temporary.write_text(standalone(drawn) + "\n", encoding="utf-8")
    return path


def in_words(document: Mapping[str, Any], entries: int) -> str:
    """What the command prints."""
    lines = [
        f"{document['evaluated']} schedules evaluated, {entries} on the front: {document['front']}",
        "held-out error of uniform schedules, and of the found one that costs no more:",
        f"  {'uniform':32} {'MACs':>6} {'error':>9}   {'MACs':>6} {'error':>9} {'ratio':>6}",
    ]
    for row in document["against_uniform"]:
        line = f"  {row['name']:32} {row['fraction']:6.3f} {row['error']:9.5f}   "
        if row["found_fraction"] is None:
            lines.append(line + "none so cheap")
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f}"
        lines.append(line + f"{row['found_fraction']:6.3f} {row['found_error']:9.5f} {ratio:>6}")
    if document["parts"]:
        apart = ", ".join(f"{k} {v['fraction']:.3f} {v['error']:.5f}" for k, v in document["parts"].items())
        lines.append(f"the schedule within half of the MACs, taken apart (MACs, error): {apart}")
    return "\n".join(lines)
