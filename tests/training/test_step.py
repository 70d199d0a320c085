"""A step by hand is the Trainer's step, and the phases of a diffcr run can be entered directly."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import job

from diffratio.routing.schedule import constant_table
from diffratio.training.build import build_data, build_module
from diffratio.training.module import Training
from diffratio.training.run import compose, plain_config
from diffratio.training.step import TrainingStep, freeze_, spread_ratios_
from diffratio.training.trainer import build_trainer


def config(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    return plain_config(compose("train", job(data, run, *overrides)))


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
    step = TrainingStep(by_hand, "cpu", cfg["budget"]["target"], "32-true")
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


@pytest.mark.parametrize("weighting", ["run", "density"])
def test_processes_that_accumulate_learn_the_ratios_of_the_whole_batch(
    weighting: str, data: Path, tmp_path: Path
) -> None:
    """Independent levels: a gradient is a mean over samples, in whatever parts it is taken."""
    cfg = config(data, tmp_path, "method=diffcr", "objective.timesteps=iid", f"budget.weighting={weighting}")
    source = build_data(cfg)
    torch.set_num_threads(1)
    batches = list(itertools.islice(source.train_dataloader(), 4))
    learned: list[torch.Tensor] = []
    for world, accumulate in ((1, 1), (1, 4), (2, 2)):
        module = build_module(cfg, source)
        step = TrainingStep(module, "cpu")
        assert module.keep_ratios is not None
        for target, batch in zip((0.92, 0.84, 0.8, 0.8), batches, strict=True):
            _accumulated(module, batch, world, accumulate)
            module.configure_gradient_clipping(step.optimizer)
            step.optimizer.step()
            module.projection.project_(module.keep_ratios, target)
        learned.append(module.keep_ratios.rho.detach().clone())
    assert float(learned[0].std()) > 0.03
    for other in learned[1:]:
        assert torch.allclose(other, learned[0], atol=2e-4), other - learned[0]


def _accumulated(module: Training, batch: dict[str, torch.Tensor], world: int, accumulate: int) -> None:
    """Leaves the gradients of a batch as DDP does: micro-batches are added up in each process, then the mean."""
    parts = {key: value.chunk(world * accumulate) for key, value in batch.items()}
    trained = [one for one in module.parameters() if one.requires_grad]
    sums: list[list[torch.Tensor]] = []
    for rank in range(world):
        module.zero_grad(set_to_none=True)
        for turn in range(accumulate):  # rank r takes part m W + r of the batch in its m-th turn
            micro = {key: value[turn * world + rank] for key, value in parts.items()}
            (module.training_step(micro, turn) / accumulate).backward()
        sums.append([one.grad.clone() for one in trained if one.grad is not None])
    with_gradient = [one for one in trained if one.grad is not None]
    for one, *own in zip(with_gradient, *sums, strict=True):
        one.grad = torch.stack(own).mean(0)


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
