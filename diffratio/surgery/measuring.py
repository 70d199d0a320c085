"""What methods cost whose cost depends on the input: counted block by block while a run goes on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffratio.backbones import backbone_of
from diffratio.cost.macs import Cost
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.methods.base import (
    Measured,
    Method,
    MethodConfig,
    check_budget,
    combined_cost,
    get_method,
    split_variant,
)
from diffratio.surgery.apply import apply_, remove_
from diffratio.surgery.state import Attachment, attachment, is_applied

Work = Callable[[nn.Module], object]  # makes whole sampling runs with a converted transformer
_SAMPLES = 2


def shared_copy(transformer: Any) -> Any:
    """A copy whose modules are its own and whose weights are the original's."""
    tensors = itertools.chain(transformer.parameters(), transformer.buffers())
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


def measured_method(state: Attachment) -> Method | None:
    """The attached method whose cost is measured, of which there is one at most."""
    return next(iter(state.watching), None)


def sample_run(transformer: nn.Module, run: SamplingRun, samples: int = _SAMPLES, seed: int = 0) -> None:
    """One run's forwards without a sampler: latents go on a straight line from noise to other noise.

    Args:
        transformer: converted.
        run: whose token grid, levels and text tokens; the conditions are drawn.
        samples: in each forward.
        seed: of noise and conditions.
    """
    backbone, state = backbone_of(transformer), attachment(transformer)
    device, training = next(transformer.parameters()).device, transformer.training
    noise = backbone.example(transformer, samples, seed, run)
    clean = backbone.example(transformer, samples, seed + 1, run)["hidden_states"]
    halves, state.halves = state.halves, None
    state.open_run(run)
    transformer.eval()
    try:
        with torch.no_grad():
            for step, level in enumerate(run.noise_levels):
                state.step = step
                latents = level * noise["hidden_states"] + (1 - level) * clean
                timestep = backbone.timestep(torch.full((samples,), level, device=device))
                transformer(**{**noise, "hidden_states": latents, "timestep": timestep}, return_dict=False)
    finally:
        state.close_run()
        state.halves = halves
        transformer.train(training)


def measured_cost(transformer: nn.Module, run: SamplingRun) -> Cost:
    """Mean cost over the samples that were made of the run with what is attached; made here where there are none.

    Args:
        transformer: with a method whose cost is measured.
        run: the dense run.
    """
    state = attachment(transformer)
    method, adapted = measured_method(state), state.adapt(run)
    assert method is not None
    if not method.traces(adapted.steps):
        sample_run(transformer, adapted)
    traces = method.traces(adapted.steps)
    found = []
    for trace, samples in traces.items():
        with method.replaying(trace):
            found.append((samples, combined_cost(state.methods, adapted, run)))
    total = sum(samples for samples, _ in found)
    layers = range(len(found[0][1].per_block))
    return Cost(
        round(sum(samples * cost.total for samples, cost in found) / total),
        found[0][1].dense,
        tuple(round(sum(samples * cost.per_block[layer] for samples, cost in found) / total) for layer in layers),
        round(sum(samples * cost.planning for samples, cost in found) / total),
    )


def calibrate(
    name: str, transformer: nn.Module, run: SamplingRun, budget: float, work: Work | None = None
) -> MethodConfig:
    """The config of a method whose cost is measured that costs within [budget - 0.01, budget].

    Args:
        name: of the method, `name:variant` for a variant.
        transformer: dense or converted; untouched. What is attached to it is left out.
        run: the run that the budget counts.
        budget: fraction of the dense run.
        work: makes whole sampling runs with the converted transformer that it is given; None takes random latents.

    Raises:
        BudgetUnreachable: with the reachable range.
    """
    cls, variant = get_method(name), split_variant(name)[1]
    plain = shared_copy(transformer)
    if is_applied(plain):
        remove_(plain)
    description = backbone_of(plain).describe(plain)

    def measure(config: MethodConfig) -> Measured:
        own = apply_(shared_copy(plain), config)
        if work is not None:
            work(own)
            if not attachment(own).token_method.traces(run.steps):
                raise DiffratioError(
                    f"{cls.name}: the sampling that measures it did not make a run of {run.steps} steps"
                )
        return Measured(measured_cost(own, run).fraction, attachment(own).token_method)

    return cls.calibrate(cls.of_variant(variant), measure, description, check_budget(budget))
