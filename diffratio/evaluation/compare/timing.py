"""Time and memory of whole sampling runs, all arms in one interleaved session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffratio.cost.latency import interleaved, peak_memory
from diffratio.evaluation.compare.arms import Contender, compiled_copy
from diffratio.evaluation.compare.cheats import is_idle
from diffratio.evaluation.compare.settings import CompareSettings
from diffratio.evaluation.metrics import efficiency
from diffratio.sampling.generate import generate


def time_arms(
    settings: CompareSettings, dense: Contender, arms: Sequence[Contender], device: str, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Times sampling runs of every arm and of the dense model, interleaved.

    Args:
        settings: batches, repeats and modes.
        dense: what every time is divided by.
        arms: what is timed; those that do nothing get the efficiency 0.
        device: where.
        say: told what is going on.

    Returns:
        Rows for the records, by the arm's key.
    """
    found: dict[str, list[dict[str, Any]]] = {one.key: [] for one in arms}
    timed = {one.key: one for one in (dense, *arms)}
    if not settings.latency_repeats or not arms:
        return found
    for mode in settings.latency_modes:
        if mode == "compiled":
            say("compiling every arm")
        pipes = {key: compiled_copy(one) if mode == "compiled" else one.pipe for key, one in timed.items()}
        for batch in settings.latency_batches:
            say(f"latency at batch {batch}, {mode}: {settings.latency_repeats} interleaved runs of {len(timed)} arms")
            runs = {key: _sampling(pipes[key], one, batch, settings) for key, one in timed.items()}
            times = interleaved(runs, settings.latency_repeats, 1, device)
            reference = times[dense.key]
            for one in arms:
                assert one.cost is not None
                own = times[one.key]
                gained = 0.0 if is_idle(one) else efficiency(own.median_ms, reference.median_ms, one.cost.fraction)
                found[one.key].append(
                    {
                        "batch": batch,
                        "mode": mode,
                        "median_ms": own.median_ms,
                        "q1_ms": own.q1_ms,
                        "q3_ms": own.q3_ms,
                        "dense_median_ms": reference.median_ms,
                        "repeats": own.repeats,
                        "efficiency": gained,
                    }
                )
    return found


def memory_of(settings: CompareSettings, one: Contender, device: str) -> float | None:
    """Peak memory in MiB of one eager sampling run at the largest timed batch; see `cost.latency.peak_memory`."""
    batch = max(settings.latency_batches, default=1)
    return peak_memory(_sampling(one.pipe, one, batch, settings), device)


def _sampling(pipe: Any, one: Contender, batch: int, settings: CompareSettings) -> Callable[[], object]:
    return lambda: generate(
        pipe, batch, batch_size=batch, steps=one.steps, guidance_scale=settings.guidance_scale,
        quiet=True, distributed=False,
    )  # fmt: skip
