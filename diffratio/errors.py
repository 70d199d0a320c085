"""Errors that a user can cause and can mend, or that end a job; the command line prints them as one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def shortened(value: object, most: int = 80) -> str:
    """How a value is shown in a message: its repr, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def in_one_line(text: object, most: int = 2000) -> str:
    """A message as one line: escapes for what a terminal would act on, and the middle of a very long one left out.

    Args:
        text: the message.
        most: characters.
    """
    words = " ".join(str(text).split())
    if len(words) > most:
        words = f"{words[: most * 2 // 3]} ... {words[-most // 3 :]}"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in words)


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of what a library raised, or its kind where it says nothing.

    Args:
        error: what was raised.
        most: characters; None gives all of them.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:most]


def kind_and_line(error: BaseException, most: int) -> str:
    """Kind and first line of what a library raised, the line cut to so many characters."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error, most)}" if str(error).strip() else kind


def speaks() -> bool:
    """Whether this is the one of several processes that answers, by what torchrun, Lightning or srun has told it."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return True


class DiffratioError(ValueError):
    """Bad input: the message names the thing, the value, the allowed set and the way out.

    Attributes:
        exit_code: of the process that it ends.
    """

    exit_code = 2


class RunFailed(DiffratioError):
    """A job whose input was good failed on the way: numbers overflow, a disk is full. What was saved stays good."""

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a queue or a shutdown sends: what is under way is put in order as after Ctrl-C.

    The message, where there is one, says how to go on.
    """

    exit_code = 143


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


_SHOWN = 10  # names of a long list, where near ones are given already


def unknown(kind: str, value: object, allowed: Iterable[str]) -> DiffratioError:
    """The error for a name that is not in a set, with the nearest names first."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    shown = names if not near else names[:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return DiffratioError(f"unknown {kind} {str(value)!r}: {hint}known are {', '.join(shown) or 'none'}{more}")


class ReportedElsewhere(DiffratioError):
    """Ends a process whose group has failed: another process of the group says why, so this one prints nothing.

    Args:
        message: for a traceback.
        exit_code: of the error that the other process reports.
    """

    def __init__(self, message: str, exit_code: int = DiffratioError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code
