"""What a sampling run's forwards take: the transformer alone, dense or converted, without scheduler and decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from diffratio.backbones import backbone_of
from diffratio.cost.latency import Timing, interleaved
from diffratio.cost.run import SamplingRun
from diffratio.surgery.state import attachment, is_applied


def run_call(transformer: nn.Module, run: SamplingRun, batch: int, seed: int = 0) -> Callable[[], None]:
    """One run's forwards on random noise, as a callable to time.

    Args:
        transformer: dense or converted, in evaluation mode.
        run: the run; steps that it evaluates without guidance take half the batch.
        batch: samples in a forward; the two guidance halves of one picture are 2.
        seed: of the noise.
    """
    backbone, state = backbone_of(transformer), attachment(transformer) if is_applied(transformer) else None
    device = next(transformer.parameters()).device
    forwards = []
    for step, level in enumerate(run.noise_levels):
        samples = max(1, batch * run.halves_at(step) // run.halves)
        timestep = backbone.timestep(torch.full((samples,), level, device=device))
        forwards.append({**backbone.example(transformer, samples, seed, run), "timestep": timestep})

    @torch.no_grad()
    def call() -> None:
        if state is not None:
            state.open_run(run)
        try:
            for step, arguments in enumerate(forwards):
                if state is not None:
                    state.step = step
                transformer(**arguments, return_dict=False)
        finally:
            if state is not None:
                state.close_run()

    return call


def time_runs(
    transformers: dict[str, nn.Module], run: SamplingRun, batch: int, repeats: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Milliseconds of a run's forwards of several transformers on one device, interleaved.

    Args:
        transformers: dense or converted, by name.
        run: the run.
        batch: samples in a forward; the two guidance halves of one picture are 2.
        repeats: timed runs of each.
        warmup: runs of each before those.
    """
    device = next(next(iter(transformers.values())).parameters()).device
    calls = {name: run_call(transformer, run, batch) for name, transformer in transformers.items()}
    return interleaved(calls, repeats, warmup, device)
