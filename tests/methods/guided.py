"""Guided sampling by hand, both halves in one batch, in either order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffratio.backbones import get_backbone
from diffratio.cost.run import Halves, SamplingRun, StepContext, uniform_run
from diffratio.surgery import attachment, is_applied
from diffratio.tokens.grid import TokenGrid

NULL = 10
STEPS = 6


def dit(seed: int = 0, **changes: Any) -> Any:
    """A tiny transformer; 6x6 tokens unless told."""
    torch.manual_seed(seed)
    return get_backbone("dit").tiny(**({"sample_size": 12} | changes)).eval()


def noise(samples: int = 3, size: int = 12, channels: int = 1, seed: int = 5) -> Tensor:
    """What sampling starts from."""
    return torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(seed))


def context(step: int, steps: int = STEPS, sides: tuple[int, int] = (6, 6), **changes: Any) -> StepContext:
    """One step of a run on a grid."""
    grid = TokenGrid(*sides)
    run = uniform_run(steps, grid)
    return StepContext(step, run.noise_levels[step], None, run, grid, **changes)


def guided_forward(transformer: Any, x: Tensor, level: float, labels: Tensor, order: Halves) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional prediction, computed together."""
    null = torch.full_like(labels, NULL)
    both = torch.cat([labels, null] if order == "cond_first" else [null, labels])
    state = attachment(transformer) if is_applied(transformer) else None
    if state:
        state.halves = order
    try:
        output = transformer(torch.cat([x, x]), torch.full((2 * len(x),), 1000 * level), both, return_dict=False)[0]
    finally:
        if state:
            state.halves = None
    first, second = output.chunk(2)
    return (first, second) if order == "cond_first" else (second, first)


@torch.no_grad()
def generate(
    transformer: Any,
    x: Tensor,
    labels: Tensor | None = None,
    steps: int = STEPS,
    order: Halves = "cond_first",
    visit: Callable[[int], None] | None = None,
) -> Tensor:
    """Euler steps of a flow with guidance 2."""
    patch, channels = transformer.config.patch_size, x.shape[1]
    run: SamplingRun = uniform_run(steps, TokenGrid(x.shape[2] // patch, x.shape[3] // patch))
    labels = torch.arange(len(x)) if labels is None else labels
    state = attachment(transformer) if is_applied(transformer) else None
    if state:
        state.open_run(run)
    for step, level in enumerate(run.noise_levels):
        conditional, unconditional = guided_forward(transformer, x, level, labels, order)
        if visit:
            visit(step)
        x = x - (unconditional + 2 * (conditional - unconditional))[:, :channels] / steps
        if state:
            state.step += 1
    if state:
        state.close_run()
    return x
