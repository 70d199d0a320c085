"""Fronts of step schedules: what `diffratio search` found, from cheap and far to dear and near the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.files import read_json
from diffratio.methods.step_schedule import FORMAT as SCHEDULE_FORMAT
from diffratio.methods.step_schedule import StepSchedule

FORMAT, VERSION = "diffratio step front", 1
FRONT_FILE = "front.json"


@dataclass(frozen=True)
class FrontEntry:
    """One schedule of a front.

    Args:
        schedule: what is done with each step.
        fraction: MACs of the run over those of the dense run.
        error: distance to the dense model's images on the searched noise; lower is nearer.
        held_out_error: the same on noise that the search has not seen; None where it was not measured.
    """

    schedule: StepSchedule
    fraction: float
    error: float
    held_out_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "fraction": self.fraction,
            "error": self.error,
            "held_out_error": self.held_out_error,
            "schedule": self.schedule.to_json(),
        }


@dataclass(frozen=True)
class StepFront:
    """Schedules of which none is beaten on both cost and error, by rising cost."""

    entries: tuple[FrontEntry, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(sorted(self.entries, key=lambda one: one.fraction)))
        for one in self.entries:
            if not all(math.isfinite(value) for value in (one.fraction, one.error, one.held_out_error or 0.0)):
                raise DiffratioError("step front: a fraction or an error is no finite number; search again")
        if not self.entries:
            raise DiffratioError("step front: it holds no schedule; search again")

    def within(
        self, budget: float | None, price: Callable[[StepSchedule], float] | None = None, method: str = "dato"
    ) -> FrontEntry:
        """The dearest schedule that costs no more than a budget.

        Args:
            budget: fraction of the dense run's MACs.
            price: schedule -> its fraction on the run at hand, infinite of one that the method cannot carry out; None
                takes the searched run's.
            method: that carries it out.

        Raises:
            BudgetUnreachable: every schedule costs more.
            DiffratioError: no budget.
        """
        low, high = self.entries[0].fraction, self.entries[-1].fraction
        if budget is None:
            raise DiffratioError(
                f"step front of {len(self.entries)} schedules from {low:.3f} to {high:.3f} of the dense MACs: say "
                "which with a budget, load_step_schedule(path, budget=0.5)"
            )
        prices = [one.fraction if price is None else price(one.schedule) for one in self.entries]
        fitting = [pair for pair in zip(prices, self.entries, strict=True) if pair[0] <= budget + 1e-9]
        if not fitting:
            possible = [one for one in prices if math.isfinite(one)]
            if not possible:
                raise DiffratioError(f"every schedule of this front prunes tokens, and {method} does not: take dato")
            span = min(possible), max(possible)
            raise BudgetUnreachable(method, budget, span, "the front holds no cheaper schedule")
        return max(fitting, key=lambda pair: pair[0])[1]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        return {"format": FORMAT, "version": VERSION, "entries": [one.to_json() for one in self.entries]}

    @classmethod
    def from_json(cls, document: Any) -> StepFront:
        """Raises DiffratioError where the document is not a front of this version."""
        try:
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise DiffratioError(
                    f"not a step front of this release: {document['format']!r} version {document['version']!r}, it "
                    f"reads {FORMAT!r} version {VERSION}"
                )
            return cls(
                tuple(
                    FrontEntry(
                        StepSchedule.from_json(one["schedule"]),
                        float(one["fraction"]),
                        float(one["error"]),
                        None if one.get("held_out_error") is None else float(one["held_out_error"]),
                    )
                    for one in document["entries"]
                )
            )
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, DiffratioError):
                raise
            raise DiffratioError(f"not a step front: {type(error).__name__} {error}") from None


def front_file(path: str | Path) -> Path:
    """The file itself, or the front in a search's folder."""
    place = Path(path)
    return place / FRONT_FILE if place.is_dir() else place


def read_schedules(path: str | Path) -> StepSchedule | StepFront:
    """A step schedule's file, or a search's front (its file or folder).

    Raises:
        DiffratioError: no such file, or neither of the two.
    """
    document = read_json(front_file(path), "step schedule")
    found = document.get("format") if isinstance(document, dict) else None
    if found == FORMAT:
        return StepFront.from_json(document)
    if found is not None and found != SCHEDULE_FORMAT:
        raise DiffratioError(
            f"not a step schedule: format {found!r} is not {SCHEDULE_FORMAT!r} or, of a search's result, {FORMAT!r}"
        )
    return StepSchedule.from_json(document)
