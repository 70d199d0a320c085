"""Fifty uses in one process hold no more than five: nothing is left of a method that was removed, or a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffratio
from diffratio.backbones import get_backbone
from diffratio.checkpoint import export
from diffratio.sampling.generate import generate
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.schedulers import make_scheduler
from tests.footprint import assert_steady, footprint

FIRST, LAST = 5, 50
SPARE = 10  # objects; of a leak there are 45 or more
STEPS = 2
METHODS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda _: diffratio.Dense(),
    "mod": lambda transformer: diffratio.for_budget("mod", transformer, budget=0.8, steps=STEPS),
    "tome": lambda _: diffratio.ToMe(),
    "block_cache": lambda _: diffratio.BlockCache(),
    "dato": lambda _: diffratio.DaTo(),
}


def tiny_pipeline(layers: int = 3) -> Any:
    transformer = get_backbone("dit").tiny(num_layers=layers).eval()
    pipe = build_pipeline(transformer, make_scheduler("dpm_solver", "noise"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def repeated(cycle: Callable[[], None]) -> None:
    """Holds no more after many cycles than after a few."""
    for _ in range(FIRST):
        cycle()
    before = footprint()
    for _ in range(LAST - FIRST):
        cycle()
    assert_steady(before, footprint(), objects=SPARE)


def sample(pipe: Any) -> None:
    generate(pipe, 1, steps=STEPS, quiet=True)


def test_methods_applied_sampled_and_removed() -> None:
    """All in each cycle: a method that leaves something behind adds fifty of it."""
    pipe = tiny_pipeline()
    configs = [config(pipe.transformer) for config in METHODS.values()]

    def cycle() -> None:
        for config in configs:
            diffratio.apply_(pipe.transformer, config)
            sample(diffratio.attach_(pipe))
            diffratio.remove_(pipe.transformer)

    repeated(cycle)


def test_a_routed_checkpoint_loaded_and_sampled(tmp_path: Path) -> None:
    transformer = tiny_pipeline(layers=2).transformer
    diffratio.apply_(transformer, diffratio.for_budget("mod", transformer, budget=0.8, steps=STEPS))
    folder = export(transformer, tmp_path / "routed")

    def cycle() -> None:
        pipe = diffratio.load_pipeline(folder)
        pipe.set_progress_bar_config(disable=True)
        sample(pipe)

    repeated(cycle)


def test_a_leak_of_one_a_cycle_is_seen() -> None:
    kept: list[Any] = []
    before = footprint()
    kept.append(torch.zeros(1))
    with pytest.raises(AssertionError, match="tensors"):
        assert_steady(before, footprint(), objects=SPARE)
    kept[:] = [[kept] for _ in range(LAST - FIRST)]
    with pytest.raises(AssertionError):
        assert_steady(before, footprint(), objects=SPARE)
