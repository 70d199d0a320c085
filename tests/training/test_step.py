"""A step by hand is the Trainer's step, and the phases of a diffcr run can be entered directly."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import job

from diffratio.routing.schedule import constant_table
from diffratio.training.build import build_data, build_module, build_trainer
from diffratio.training.run import compose, plain_config
from diffratio.training.step import TrainingStep, freeze_, spread_ratios_


def config(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    return plain_config(compose("train", job(data, run, "trainer.precision=32-true", *overrides)))


@pytest.mark.parametrize("method", ["dense", "mod", "diffcr"])
def test_steps_by_hand_equal_those_of_the_trainer(method: str, data: Path, tmp_path: Path) -> None:
    cfg = config(
        data, tmp_path, f"method={method}", "trainer.max_steps=3", "optimizer.ema=0", "objective.distill=0.5",
        "budget.anneal=0", "budget.freeze=1",
    )  # fmt: skip
    source = build_data(cfg)
    torch.set_num_threads(1)
    batches = list(itertools.islice(source.train_dataloader(), 2))
    by_hand = build_module(cfg, source)
    step = TrainingStep(by_hand, "cpu", cfg["budget"]["target"])
    losses = [step(batch) for batch in batches]
    assert all(loss > 0 for loss in losses)
    module = build_module(cfg, source)
    seen: list[dict[str, torch.Tensor]] = []
    inner = module.optimizer_step

    def recorded(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        seen.append({name: value.detach().clone() for name, value in module.transformer.named_parameters()})

    module.optimizer_step = recorded  # type: ignore[method-assign]
    build_trainer(cfg, tmp_path, module.optimizer_settings).fit(module, datamodule=source)
    own = dict(by_hand.transformer.named_parameters())
    assert set(own) == set(seen[1])
    for name, value in own.items():
        assert torch.allclose(value, seen[1][name], atol=1e-7), name


def test_spread_ratios_are_apart_and_stay_on_the_budget(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, "method=diffcr", "budget.target=0.7")
    source = build_data(cfg)
    module = spread_ratios_(build_module(cfg, source), 0.7, 0.2)
    assert module.keep_ratios is not None
    assert float(module.keep_ratios.rho.detach().std()) > 0.05
    assert module.projection.fraction(module.keep_ratios) == pytest.approx(0.7, abs=1e-4)
    step = TrainingStep(module, "cpu", 0.7)
    step(next(iter(source.train_dataloader())))
    assert module.projection.fraction(module.keep_ratios) == pytest.approx(0.7, abs=1e-4)


def test_a_frozen_module_trains_on_its_schedule(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, "method=diffcr", "budget.target=0.7")
    source = build_data(cfg)
    module = freeze_(spread_ratios_(build_module(cfg, source), 0.7, 0.2), 0.7)
    assert not module.learning_ratios and 0.69 <= module.method.macs(module.run).fraction <= 0.7
    table: Any = module.method
    assert table.bins != constant_table(3, 4, 10)
    before = [value.detach().clone() for value in module.transformer.parameters()]
    TrainingStep(module, "cpu")(next(iter(source.train_dataloader())))
    changed = [not torch.equal(a, b) for a, b in zip(before, module.transformer.parameters(), strict=True)]
    assert any(changed)
