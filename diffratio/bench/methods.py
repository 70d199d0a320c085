"""`bench methods`: every training-free method and every peer, whole sampling runs at one budget on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffratio import surgery
from diffratio.bench.models import compile_blocks_, shared_copy, wide_dit
from diffratio.bench.peers import Fitted, fit
from diffratio.bench.planning import plans
from diffratio.bench.sampling import sampling_call, sampling_run
from diffratio.bench.settings import BenchSettings, MethodsSettings
from diffratio.bench.table import Row, Variant, measure
from diffratio.catalog import METHODS
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import get_method
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.schedulers import make_scheduler


def training_free() -> list[str]:
    """Names of the methods that need no trained weights, without the control that does nothing."""
    return [name for name in METHODS if name != "dense" and not get_method(name).learned]


def bench_methods(settings: BenchSettings, own: MethodsSettings, device: str, dtype: torch.dtype) -> list[Row]:
    """Times whole sampling runs of a DiT of random weights; caches decide by its activations.

    Args:
        settings: repeats, warm-up, seed.
        own: budget, sizes, run, batch sizes, modes, peers.
        device: where.
        dtype: of the weights.

    Returns:
        For each batch size and mode: dense, the training-free methods of the catalog, the peers. Those that cannot
        reach the budget or do not attach are rows that say so.
    """
    transformer = wide_dit(own.width, own.depth, own.tokens, device, dtype, settings.seed)
    rows = []
    for mode in own.modes:
        for batch in own.batches:
            if mode == "compiled":
                torch.compiler.reset()
            group = (
                f"d = {own.width}, {own.depth} blocks, N = {own.tokens}, {own.steps} steps, guidance "
                f"{own.guidance_scale:g}, batch {batch}, {mode}, budget {own.budget:g}"
            )
            bench = _Bench(settings, own, transformer, batch, mode)
            rows += measure(group, bench.variants(), settings, device)
    return rows


class _Bench:
    """Builds the variants of one batch size and mode."""

    def __init__(self, settings: BenchSettings, own: MethodsSettings, transformer: Any, batch: int, mode: str) -> None:
        self.settings, self.own, self.transformer = settings, own, transformer
        self.batch, self.mode = batch, mode
        self.run = sampling_run(self.pipeline(transformer), own.steps, own.guidance_scale)
        self.facts = {
            "width": own.width,
            "depth": own.depth,
            "tokens": own.tokens,
            "steps": own.steps,
            "batch": batch,
            "mode": mode,
            "budget": own.budget,
        }

    @staticmethod
    def pipeline(transformer: Any) -> Any:
        """Its own scheduler, so that nothing is shared but weights."""
        return build_pipeline(transformer, make_scheduler("flow_euler"))

    def ready(self, transformer: Any) -> Any:
        """Compiled in place where the mode says so."""
        return compile_blocks_(transformer) if self.mode == "compiled" else transformer

    def call(self, pipe: Any, steps: int | None = None) -> Callable[[], object]:
        """One sampling run."""
        steps = self.own.steps if steps is None else steps
        return sampling_call(pipe, self.batch, steps, self.own.guidance_scale, self.settings.seed)

    def variants(self) -> dict[str, Variant]:
        """Dense first; it is the plain model, with nothing of ours in it."""
        dense = self.pipeline(self.ready(shared_copy(self.transformer)))
        found = {"dense": Variant(self.call(dense), 1.0, facts={**self.facts, "kind": "dense"})}
        for name in training_free():
            found[name] = self.ours(name)
        for name in self.own.peers:
            found[f"peer {name}"] = self.peer(name)
        return found

    def ours(self, name: str) -> Variant:
        """A method of the catalog at the budget."""
        facts = {**self.facts, "kind": "method"}
        try:
            config = surgery.for_budget(name, self.transformer, self.own.budget, run=self.run)
            pipe, run = self._applied(config)
            if surgery.is_measured(pipe.transformer):  # its cost depends on the input
                self.call(pipe, run.steps)()
            fraction = surgery.macs(pipe.transformer, run=self.run).fraction
            self.ready(pipe.transformer)
        except BudgetUnreachable as error:
            return Variant(None, facts=facts, status="unreachable", note=str(error))
        except DiffratioError as error:
            return Variant(None, facts=facts, status="cannot run", note=str(error))
        planners = [method for method in surgery.attachment(pipe.transformer).methods if plans(method)]
        facts["config"] = repr(config)
        return Variant(self.call(pipe, run.steps), fraction, facts=facts, planners=planners)

    def _applied(self, config: Any) -> tuple[Any, SamplingRun]:
        pipe = self.pipeline(surgery.apply_(shared_copy(self.transformer), config, self.settings.seed))
        method = surgery.attachment(pipe.transformer).methods[0]
        run = method.adapt(self.run)
        if run.steps == self.run.steps:
            surgery.attach_(pipe)
        return pipe, run

    def peer(self, name: str) -> Variant:
        """A peer at its mildest setting within the budget."""
        facts = {**self.facts, "kind": "peer"}
        fitted = fit(
            name, self.transformer, self.run, self.own.budget, self.ready,
            lambda model: self.call(self.pipeline(model)), self.batch,
        )  # fmt: skip
        if fitted.transformer is None:
            return Variant(None, facts=facts, status=fitted.status, note=fitted.note)
        more = {**facts, "config": repr(fitted.knob)}
        return Variant(self._inside(fitted), fitted.macs, facts=more, note=fitted.note)

    def _inside(self, fitted: Fitted) -> Callable[[], object]:
        sample = self.call(self.pipeline(fitted.transformer))

        def inside() -> None:
            with fitted.around():
                sample()

        return inside
