"""Where `dato` looks for a budget: uniform intervals, uniform ratios, and how many blocks cached steps run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.methods.base import Method
from diffratio.methods.dato_config import DaTo
from diffratio.methods.merging import Ladder
from diffratio.methods.step_schedule import HIGHEST


def ladders(
    cls: type[Method], description: Description, run: SamplingRun, budget: float, mode: str
) -> Iterator[Sequence[DaTo]]:
    """Configs of modes `both` and `prune`, by number of computed steps, from little pruning to much."""
    steps = run.steps
    counts = [steps]
    if mode == "both":

        def cached(count: int) -> float:
            return cls(DaTo(every=steps / count, ratio=0.0), description).macs(run).fraction

        half = next((count for count in range(steps, 0, -1) if cached(count) <= (1 + budget) / 2), 1)
        counts = [half, *([half + 1] if half < steps else []), *range(half - 1, 0, -1)]
    for scope in ("attn", "attn_ff"):
        for count in counts:
            rungs = run.grid.tokens * count

            def config(at: int, count: int = count, scope: str = scope, rungs: int = rungs) -> DaTo:
                ratio = HIGHEST * (at + 1) / rungs
                return DaTo(every=steps / count, ratio=ratio, mode=mode, scope=scope, mix=True)

            yield Ladder(rungs, config)


def cache_ladders(description: Description, run: SamplingRun) -> Iterator[Sequence[DaTo]]:
    """Configs of mode `cache`, by number of computed steps; fewer blocks run after the skipped ones."""
    last = max(1, description.layers - 2)  # at most so many after the skipped ones
    for count in range(run.steps - 1, 0, -1):

        def config(at: int, count: int = count) -> DaTo:
            return DaTo(every=run.steps / count, ratio=0.0, mode="cache", last_blocks=last - at)

        yield Ladder(last, config)
