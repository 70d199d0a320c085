"""What a comparison will do and roughly how long it will take, before it does anything."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from diffratio.evaluation.compare.arms import Contender, Lineup
from diffratio.evaluation.compare.cheats import _SAMPLES
from diffratio.evaluation.compare.settings import CompareSettings, TrainedArm
from diffratio.sampling.generate import generate

ESTIMATE = "one timed dense forward x steps x MACs fraction: without features, metrics, compilation and training"


def make_plan(
    settings: CompareSettings,
    lineup: Lineup,
    finished: Collection[str],
    pending: Sequence[TrainedArm] = (),
    processes: int = 1,
) -> dict[str, Any]:
    """Every arm with what it costs and what is left to do; times one dense forward.

    Args:
        settings: of the comparison.
        lineup: its arms.
        finished: ids of the records that stand already.
        pending: arms that are to be trained first.
        processes: how many share the sampling.

    Returns:
        Plain data: `arms` (a row each), `samples` and `seconds` in total, and how the time was estimated.
    """
    forward = dense_seconds(settings, lineup)  # of one sample in one step, all guidance halves
    sampled = forward * lineup.run.steps
    rows: list[dict[str, Any]] = []
    for one in lineup.contenders:
        seeds = [seed for seed in settings.seeds if one.seed in (None, seed)]
        missing = [seed for seed in seeds if one.id(seed) not in finished]
        fraction = one.cost.fraction if one.cost else None
        status = "unreachable" if one.unreachable else "to do" if missing else "finished"
        samples = settings.n * len(missing) if fraction is not None else 0
        seconds = 0.0
        if fraction is not None and missing:
            seconds = samples * sampled * fraction / processes
            timed = sum(settings.latency_batches) * (settings.latency_repeats + 1) * len(settings.latency_modes)
            seconds += ((timed if settings.latency_repeats else 0) + 3 * _SAMPLES + 1) * sampled * fraction
            halves = lineup.run.halves
            seconds += 4 * settings.validation_n * forward / halves * fraction if one.has_losses else 0
        rows.append(
            {
                "arm": one.arm.name,
                "budget": one.budget,
                "weights": one.arm.weights,
                "seeds": seeds,
                "missing_seeds": missing,
                "status": status,
                "reason": one.unreachable,
                "macs_fraction": fraction,
                "steps": one.steps or None,
                "samples": samples,
                "seconds": round(seconds, 1),
            }
        )
    for arm in pending:
        rows.append(
            {
                "arm": arm.name,
                "budget": arm.budget,
                "weights": settings.weights,
                "seeds": [arm.seed],
                "missing_seeds": [arm.seed],
                "status": "to train",
                "reason": f"{settings.train_steps} training steps first",
                "macs_fraction": arm.budget,
                "steps": settings.steps,
                "samples": settings.n,
                "seconds": round(settings.n * sampled * arm.budget / processes, 1),
            }
        )
    return {
        "arms": rows,
        "samples": sum(row["samples"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "estimate": ESTIMATE,
    }


def dense_seconds(settings: CompareSettings, lineup: Lineup) -> float:
    """Seconds a sample that one step of the dense model takes, after a warm-up, at the comparison's batch size."""
    batch = max(1, min(settings.batch_size, settings.n))
    steps = 2  # PixArt's pipelines take a run of one step for another kind of model

    def step() -> object:
        return generate(
            lineup.dense.pipe, batch, batch_size=batch, steps=steps, guidance_scale=settings.guidance_scale,
            quiet=True, distributed=False,
        )  # fmt: skip

    step()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) / (batch * steps)


def plan_text(plan: dict[str, Any]) -> str:
    """The plan as a table for reading."""
    head = ("arm", "budget", "MACs", "steps", "seeds", "samples", "time", "status")
    lines = [head]
    for row in plan["arms"]:
        fraction = row["macs_fraction"]
        reason = f": {row['reason']}" if row["reason"] else ""
        lines.append(
            (
                row["arm"],
                f"{row['budget']:g}",
                "-" if fraction is None else f"{fraction:.3f}",
                str(row["steps"] or "-"),
                str(len(row["missing_seeds"])),
                str(row["samples"]),
                duration(row["seconds"]),
                f"{row['status']}{reason}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    table = ["  ".join([*(f"{cell:{w}}" for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join([*table, f"{plan['samples']} samples, about {duration(plan['seconds'])} ({plan['estimate']})"])


def duration(seconds: float) -> str:
    """Seconds in words that are short: 42 s, 7 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def remaining(settings: CompareSettings, cells: Sequence[tuple[int, Contender]], todo: Collection[str]) -> int:
    """Samples that are still to be generated."""
    return settings.n * sum(one.id(seed) in todo and one.unreachable is None for seed, one in cells)
