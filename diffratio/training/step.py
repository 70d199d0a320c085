"""One training step outside a Trainer: the same loss, clipping, optimizer and projection, and nothing around them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from diffratio.routing.schedule import KeepSchedule
from diffratio.surgery import drop_root_module_
from diffratio.training.module import Training
from diffratio.training.trainer import best_precision


class _Host:
    """What a `Training` module asks of its Trainer in a step: one process, early in a long run."""

    world_size = 1
    global_step = 0
    max_steps = 1_000_000


class TrainingStep:
    """Runs optimizer steps of a module by hand: what a user's step computes, without loop, logs, averages and files.

    Args:
        module: what `build_module` returns; from now on it belongs to the step.
        device: where it runs.
        target: fraction of the budget's unit that learned ratios are brought back onto after every step; else unused.
        precision: as of `trainer.precision`, bf16-mixed or 32-true; auto takes what the hardware multiplies.

    Example:
        >>> from diffratio.training.build import build_data, build_module
        >>> from diffratio.training.run import compose, plain_config
        >>> cfg = plain_config(compose("train", ["method=mod", "data.batch_size=2"]))
        >>> data = build_data(cfg)
        >>> step = TrainingStep(build_module(cfg, data), "cpu")
        >>> step(next(iter(data.train_dataloader()))) > 0
        True
    """

    def __init__(
        self, module: Training, device: str | torch.device, target: float = 1.0, precision: str = "auto"
    ) -> None:
        self.module, self.target = module.to(device), target
        self.device = torch.device(device)
        host: Any = _Host()
        module.trainer = host
        module.log = _mute  # type: ignore[method-assign]
        accelerator = "gpu" if self.device.type == "cuda" else "cpu"
        self.precision = best_precision(accelerator) if precision == "auto" else precision
        self.optimizer = module.configure_optimizers()["optimizer"]

    def __call__(self, batch: dict[str, Tensor]) -> float:
        """One step.

        Args:
            batch: of the data module, on any device.

        Returns:
            The loss.
        """
        module = self.module
        batch = {key: value.to(self.device) for key, value in batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = module.training_step(batch, 0)
        loss.backward()
        module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        if module.learning_ratios:
            assert module.keep_ratios is not None
            module.projection.project_(module.keep_ratios, self.target)
        return float(loss.detach())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bf16-mixed":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _mute(*args: Any, **kwargs: Any) -> None:
    """Stands for `log`, which needs a running Trainer."""


@torch.no_grad()
def spread_ratios_(module: Training, target: float, spread: float, seed: int = 0) -> Training:
    """Puts learned ratios where they stand in mid-training: apart from each other, and on a budget.

    Args:
        module: one that learns its ratios.
        target: MACs fraction; lower keeps fewer tokens.
        spread: largest distance from their common value before they are brought onto the budget.
        seed: of the draws.
    """
    assert module.keep_ratios is not None and module.learning_ratios
    rho = module.keep_ratios.rho
    draws = torch.rand(rho.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rho.copy_((target + spread * (2 * draws - 1)).clamp(0.1, 1.0))
    module.projection.project_(module.keep_ratios, target)
    return module


def freeze_(module: Training, target: float) -> Training:
    """Rounds learned ratios into a budget and fixes the schedule, without measuring what it costs in loss.

    Args:
        module: one that learns its ratios.
        target: MACs fraction; lower keeps fewer tokens.
    """
    method: Any = module.method
    assert module.learning_ratios
    table = method.round_(module.costs, target)
    method.freeze_(KeepSchedule.solved(table, module.costs, target))
    drop_root_module_(module.transformer, "keep_ratios")
    return module
