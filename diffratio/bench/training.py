"""`bench training`: one optimizer step of every way to train, on the data and model of an experiment."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffratio.bench.profiling import profiled
from diffratio.bench.settings import BenchSettings, TrainingSettings
from diffratio.bench.table import Row, Variant, measure
from diffratio.methods.diffcr import ESTIMATORS

ORACLE = "loop"
NOTES = {
    "grouped": "both bins, exact; samples of equal bins together",
    "soft": "one pass at the upper bin, approximate between bins",
    "loop": "both bins, exact; one sample at a time, as published",
}
BATCHES = 4


def bench_training(settings: BenchSettings, own: TrainingSettings, device: str) -> list[Row]:
    """Times training steps: forward, loss, backward, clipping, optimizer, projection onto the budget.

    Args:
        settings: repeats, warm-up, seed.
        own: the experiment, overrides, batch sizes, spread of the ratios.
        device: where.

    Returns:
        For each batch size: dense, mod, hand; for each estimator (the slow `loop` where it is asked for) diffcr at the
        start of the annealing, on the target, and frozen; then the whole run, put together from these by the
        experiment's own anneal and freeze.
    """
    rows = []
    for batch in own.batches:
        cfg, data, batches = _job(own, settings.seed, batch)
        variants = _variants(cfg, own, settings.seed, device, data, batches)
        group = (
            f"{own.experiment}, batch {batch}, one step, budget {cfg['budget']['target']:g}, "
            f"distillation {'on' if cfg['objective']['distill'] else 'off'}"
        )
        measured = measure(group, variants, settings, device)
        if own.profile:
            measured = [_with_profile(row, variants[row.variant], device) for row in measured]
        rows += [*measured, *_whole_runs(group, measured, cfg["budget"], _estimators(own))]
    return rows


def _with_profile(row: Row, variant: Variant, device: str) -> Row:
    if variant.call is None or row.time is None:
        return row
    return dataclasses.replace(row, facts={**row.facts, "profile": profiled(variant.call, device)})


def _estimators(own: TrainingSettings) -> tuple[str, ...]:
    return tuple(name for name in ESTIMATORS if own.loop or name != ORACLE)


def _job(own: TrainingSettings, seed: int, batch: int) -> tuple[dict[str, Any], Any, list[dict[str, Tensor]]]:
    """The experiment's config, its data module and the first few batches of it."""
    from diffratio.training.build import build_data
    from diffratio.training.run import compose, plain_config

    words = [f"experiment={own.experiment}", f"data.batch_size={batch}", f"seed={seed}", *own.overrides]
    cfg = plain_config(compose("train", words))
    data = build_data(cfg)
    return cfg, data, list(itertools.islice(data.train_dataloader(), BATCHES))


def _variants(
    cfg: dict[str, Any], own: TrainingSettings, seed: int, device: str, data: Any, batches: list[dict[str, Tensor]]
) -> dict[str, Variant]:
    from diffratio.training.build import build_module
    from diffratio.training.step import TrainingStep, freeze_, spread_ratios_

    target = float(cfg["budget"]["target"])
    facts = {"batch": len(batches[0]["images"]), "experiment": own.experiment}

    def step(module: Any, at: float = 1.0) -> Callable[[], object]:
        stepping, turn = TrainingStep(module, device, at), itertools.cycle(batches)
        return lambda: stepping(next(turn))

    def built(**method: Any) -> Any:
        return build_module({**cfg, "method": method}, data)

    def variant(module: Any, at: float = 1.0, macs: float | None = None, note: str = "", **more: Any) -> Variant:
        cost = module.method.macs(module.run).fraction if macs is None else macs
        more = {**facts, "method": module.method.name, **more}
        return Variant(step(module, at), cost, facts=more, note=note, scores=False)

    found = {"dense": variant(built(name="dense"))}
    for name in ("mod", "hand"):
        found[name] = variant(built(name=name))
    regions = cfg["method"].get("regions", 4)
    for estimator in _estimators(own):
        chosen, note = {"name": "diffcr", "regions": regions, "estimator": estimator}, NOTES[estimator]
        found[f"diffcr {estimator}, start"] = variant(built(**chosen), 1.0, 1.0, note, phase="start")
        learning = spread_ratios_(built(**chosen), target, own.spread, seed)
        found[f"diffcr {estimator}, on target"] = variant(learning, target, target, note, phase="learning")
    frozen = freeze_(spread_ratios_(built(name="diffcr", regions=regions), target, own.spread, seed), target)
    found["diffcr, frozen"] = variant(frozen, phase="frozen")
    return found


def _whole_runs(group: str, rows: list[Row], budget: dict[str, Any], estimators: tuple[str, ...]) -> list[Row]:
    """A run anneals from the start onto the target, learns on it, and is frozen for the rest."""
    times = {row.variant: row.time for row in rows}
    anneal, freeze = float(budget["anneal"]), float(budget["freeze"])
    found = []
    for estimator in estimators:
        phases = (
            times[f"diffcr {estimator}, start"],
            times[f"diffcr {estimator}, on target"],
            times["diffcr, frozen"],
        )
        weights = anneal / 2, freeze - anneal / 2, 1 - freeze
        name = f"diffcr {estimator}, whole run"
        facts = {"phase": "whole", "anneal": anneal, "freeze": freeze}
        if any(time is None for time in phases):
            found.append(Row(group, name, status="not derived", note="a phase of it failed", facts=facts))
            continue
        time = sum(weight * (one or 0.0) for weight, one in zip(weights, phases, strict=True))
        note = f"anneal {anneal:g}, freeze {freeze:g} of the steps"
        found.append(Row(group, name, time=time, status="derived", note=note, facts=facts))
    return found
