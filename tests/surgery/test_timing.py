"""A run's forwards as something to time: which are made, and what they leave behind. Nothing asserts how fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.surgery import attachment, run_call, time_runs
from diffratio.tokens.grid import TokenGrid

RUN = uniform_run(4, TokenGrid(4, 4))


def watched(transformer: Any) -> list[tuple[int, float]]:
    """Samples and timestep of every forward."""
    seen: list[tuple[int, float]] = []

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((len(kwargs["hidden_states"]), float(kwargs["timestep"][0])))

    transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("routed", [False, True])
def test_a_run_is_every_step_once(routed: bool) -> None:
    transformer: Any = get_backbone("dit").tiny().eval()
    if routed:
        diffratio.apply_(transformer, diffratio.MoD(keep=0.5))
    seen = watched(transformer)
    run_call(transformer, RUN, 2)()
    assert seen == [(2, 1000.0), (2, 750.0), (2, 500.0), (2, 250.0)]


def test_steps_without_guidance_take_half_the_batch() -> None:
    transformer: Any = get_backbone("dit").tiny().eval()
    diffratio.apply_(transformer, diffratio.MoD(keep=0.5))
    seen = watched(transformer)
    run_call(transformer, SamplingRun(RUN.noise_levels, RUN.grid, guided=(True, False, True, False)), 4)()
    assert [samples for samples, _ in seen] == [4, 2, 4, 2]


def test_regions_follow_the_steps_and_the_run_is_closed() -> None:
    transformer: Any = get_backbone("dit").tiny().eval()
    bins = tuple((10, 5, 3, 1) for _ in range(3))
    diffratio.apply_(transformer, diffratio.DiffCR(diffratio.KeepSchedule(bins, RUN)))
    state, tokens = attachment(transformer), []
    feed_forward = transformer.transformer_blocks[1].ff
    feed_forward.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    times = time_runs({"routed": transformer}, RUN, 2, repeats=2, warmup=0)
    # levels 1, 0.75, 0.5, 0.25 lie in regions 3, 3, 2, 1: bins 1, 1, 3, 5
    assert tokens == [2, 2, 5, 8] * 2 and times["routed"].repeats == 2
    assert state.run is None and state.context is None
    assert not any(parameter.grad is not None for parameter in transformer.parameters())
    assert torch.is_grad_enabled()
