"""Errors that a user can cause and can mend; the command line prints them as one line and exits 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffratioError(ValueError):
    """Bad input: the message names the thing, the value, the allowed set and the way out."""


class BudgetUnreachable(DiffratioError):
    """A method cannot cost what the budget asks for.

    Args:
        method: registered name of the method.
        budget: fraction of the dense MACs that was asked for.
        reachable: lowest and highest fraction that the method can cost on this run.
        hint: what would widen the range.
    """

    def __init__(self, method: str, budget: float, reachable: tuple[float, float], hint: str = "") -> None:
        self.method, self.budget, self.reachable = method, budget, reachable
        low, high = reachable
        message = f"{method} cannot reach a budget of {budget:g}: on this run it costs {low:.3f} to {high:.3f} of dense"
        super().__init__(f"{message}; {hint}" if hint else message)


def unknown(kind: str, value: object, allowed: Iterable[str]) -> DiffratioError:
    """The error for a name that is not in a set, with the nearest names first."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return DiffratioError(f"unknown {kind} {str(value)!r}: {hint}known are {', '.join(names) or 'none'}")


class ReportedElsewhere(DiffratioError):
    """Ends a process whose group has failed: another process of the group says why, so this one prints nothing."""
