"""`bench sampling`: whole sampling runs of checkpoints, against the dense one and against fewer steps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.bench.models import compile_blocks_
from diffratio.bench.settings import BenchSettings, SamplingSettings
from diffratio.bench.table import Row, Variant, measure
from diffratio.checkpoint import load_pipeline
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.sampling.generate import generate, in_turn
from diffratio.sampling.schedulers import noise_levels, set_steps


def bench_sampling(settings: BenchSettings, own: SamplingSettings, device: str) -> list[Row]:
    """Times `generate`, noise to pictures, as a user calls it.

    Args:
        settings: repeats, warm-up, seed.
        own: checkpoints, steps, guidance, batch sizes, modes.
        device: where.

    Returns:
        For each batch size and mode: dense, then each routed checkpoint, each followed by `fewer_steps` at its budget.

    Raises:
        DiffratioError: a checkpoint that is not there, or of the wrong kind.
    """
    rows = []
    for mode in own.modes:
        dense, routed = _pipelines(own, device)
        if mode == "compiled":
            for pipe in (dense, *routed.values()):
                compile_blocks_(pipe.transformer)
        for batch in own.batches:
            group = f"{own.weights}, {own.steps} steps, guidance {own.guidance_scale:g}, batch {batch}, {mode}"
            facts = {"batch": batch, "mode": mode, "steps": own.steps}
            rows += measure(group, _variants(settings, own, dense, routed, facts), settings, device)
    return rows


def _pipelines(own: SamplingSettings, device: str) -> tuple[Any, dict[str, Any]]:
    dense = load_pipeline(own.weights, device=device)
    if surgery.is_applied(dense.transformer):
        raise DiffratioError(f"weights={own.weights!r} is a routed checkpoint; give the dense one, and this in routed")
    computing = next(dense.transformer.parameters()).dtype  # off the CPU as stored, which may be another for each
    routed = {source: load_pipeline(source, computing, device) for source in own.routed}
    for source, pipe in routed.items():
        if not surgery.is_applied(pipe.transformer):
            raise DiffratioError(
                f"routed: {source!r} is a dense checkpoint; routed takes what `diffratio export` wrote"
            )
    return dense, routed


def _variants(
    settings: BenchSettings, own: SamplingSettings, dense: Any, routed: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Variant]:
    run = sampling_run(dense, own.steps, own.guidance_scale)

    def sample(pipe: Any, steps: int) -> Callable[[], object]:
        return sampling_call(pipe, facts["batch"], steps, own.guidance_scale, settings.seed)

    found = {"dense": Variant(sample(dense, own.steps), 1.0, facts={**facts, "method": "dense"})}
    for source, pipe in routed.items():
        method = surgery.attachment(pipe.transformer).token_method
        fraction = surgery.macs(pipe.transformer, run=run).fraction
        found[source] = Variant(sample(pipe, own.steps), fraction, facts={**facts, "method": method.name})
        schedule = getattr(method.config, "schedule", None)
        budget = schedule.budget if schedule is not None and schedule.unit == "macs" else fraction
        more = {**facts, "method": "fewer_steps"}
        name = f"fewer_steps at {budget:.3g}"
        try:
            config: Any = surgery.for_budget("fewer_steps", dense.transformer, budget, run=run)
        except BudgetUnreachable as error:
            found[name] = Variant(None, facts=more, status="unreachable", note=str(error))
            continue
        fewer = config.method(config, surgery.describe(dense.transformer))
        steps = fewer.adapt(run).steps
        found[name] = Variant(sample(dense, steps), fewer.macs(run).fraction, facts={**more, "steps": steps})
    return found


def sampling_run(pipe: Any, steps: int, guidance_scale: float) -> SamplingRun:
    """The dense run of a pipeline: its scheduler's own noise levels."""
    set_steps(pipe.scheduler, steps)
    guidance = "cfg" if guidance_scale > 1 else "none"
    backbone = backbone_of(pipe.transformer)
    grid, text = backbone.grid(pipe.transformer), backbone.text_tokens(pipe.transformer)
    return SamplingRun(noise_levels(pipe.scheduler), grid, guidance, text)  # type: ignore[arg-type]


def sampling_call(pipe: Any, batch: int, steps: int, guidance_scale: float, seed: int) -> Callable[[], object]:
    """One sampling run of `batch` samples, always the same ones."""
    labels = in_turn(pipe, batch)
    return lambda: generate(
        pipe, batch, seed=seed, labels=labels, batch_size=batch, steps=steps,
        guidance_scale=guidance_scale, quiet=True, distributed=False,
    )  # fmt: skip
