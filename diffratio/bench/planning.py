"""What making plans takes of a run: scoring, sorting and matching, without the gathers that carry them out."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from diffratio.methods.base import Method

_WORK = ("begin_step", "plan", "end_step")


def plans(method: Method) -> bool:
    """Whether it makes plans for sites inside the blocks."""
    return type(method).plan is not Method.plan


def planning_share(call: Callable[[], object], methods: Sequence[Method], device: str, repeats: int = 3) -> float:
    """Time in the methods' planning / time of the whole call, median over repeats.

    Args:
        call: the run, called before, so that nothing is made for the first time.
        methods: whose `begin_step`, `plan` and `end_step` are timed; on a GPU each is waited for, so that the share is
            an upper bound there.
        device: where they run.
        repeats: calls.
    """
    cuda = torch.device(device).type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    shares = []
    for _ in range(repeats):
        with _watched(methods, now) as spent:
            start = now()
            call()
            shares.append(sum(spent) / (now() - start))
    return statistics.median(shares)


@contextlib.contextmanager
def _watched(methods: Sequence[Method], now: Callable[[], float]) -> Iterator[list[float]]:
    """Puts a clock around the methods' planning; yields the seconds of each outermost call."""
    spent: list[float] = []
    inside: list[str] = []

    def around(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if inside:  # one calls another: counted once
                return work(*args, **kwargs)
            inside.append(name)
            start = now()
            try:
                return work(*args, **kwargs)
            finally:
                spent.append(now() - start)
                inside.clear()

        return timed

    for method in methods:
        for name in _WORK:
            setattr(method, name, around(getattr(method, name), name))
    try:
        yield spent
    finally:
        for method in methods:
            for name in _WORK:
                delattr(method, name)
