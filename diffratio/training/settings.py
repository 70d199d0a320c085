"""Typed settings of a training job."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffratio.cost.macs import UNITS
from diffratio.errors import DiffratioError, shortened, unknown
from diffratio.methods.base import check_budget
from diffratio.objectives.draws import TIMESTEPS
from diffratio.plain import typed

Config = Mapping[str, Any]
WEIGHTINGS = ("run", "density")
TRAINABLE = ("all", "none")
NONFINITE = ("stop", "skip")
MOST_STEPS = 10**9  # and pictures; more is a slip of the hand
OPTIMIZERS = ("adamw", "fused", "adamw_8bit")


@dataclass(frozen=True)
class BudgetSettings:
    """What a learned schedule may cost.

    Args:
        target: fraction of the dense run's cost in this unit; lower keeps fewer tokens.
        unit: what is counted: `macs`, `latency` (milliseconds of a cost table) or `mean_ratio` (the mean keep ratio, as
            published).
        table: file of the cost table that `latency` counts in, as `diffratio bench table` writes it.
        steps: sampling steps of the run that the budget refers to.
        guidance: whether that run has both guidance halves.
        anneal: fraction of the training steps over which the target falls from 1, or from what the ratios start at.
        freeze: fraction of the training steps after which the ratios are rounded and fixed.
        weighting: how much the loss in a region weighs for the ratios: `run`, by the run's steps in it, as its cost
            does; `density`, by how often training visits it, as published.
    """

    target: float = 0.8
    unit: str = "macs"
    table: str | None = None
    steps: int = 20
    guidance: bool = True
    anneal: float = 0.3
    freeze: float = 0.5
    weighting: str = "run"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise unknown("budget.unit", self.unit, UNITS)
        if self.unit == "latency" and not self.table:
            raise DiffratioError(
                "budget.unit=latency counts the milliseconds of a cost table: make one with "
                "`diffratio bench table out=FILE.json` and give budget.table=FILE.json"
            )
        if self.unit != "latency" and self.table:
            raise DiffratioError(f"budget.table={self.table!r} is for budget.unit=latency, and the unit is {self.unit}")
        if self.weighting not in WEIGHTINGS:
            raise unknown("budget.weighting", self.weighting, WEIGHTINGS)
        try:
            check_budget(self.target)
        except DiffratioError as error:
            raise DiffratioError(f"budget.target: {error}") from None
        if self.steps < 1:
            raise DiffratioError(f"budget.steps {self.steps!r} must be at least 1")
        for name in ("anneal", "freeze"):
            if not 0 <= getattr(self, name) <= 1:
                raise DiffratioError(
                    f"budget.{name} {getattr(self, name)!r} is outside [0, 1]; it is a fraction of the steps"
                )
        if self.freeze < self.anneal:
            raise DiffratioError(f"budget.freeze ({self.freeze}) lies before budget.anneal ({self.anneal})")

    @property
    def counted(self) -> str:
        """What the unit is called in a sentence."""
        return {"macs": "MACs", "latency": "milliseconds", "mean_ratio": "mean keep ratio"}[self.unit]

    def at(self, fraction: float, begin: float = 1.0) -> float:
        """The target at a fraction of the training.

        Args:
            fraction: of the steps, 0 at the start.
            begin: fraction that the ratios cost at the start.
        """
        if self.anneal == 0:
            return self.target
        return begin - (begin - self.target) * min(1.0, fraction / self.anneal)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a group each for weights, routers and ratios.

    Args:
        weights: `all` trains the transformer's own weights, `none` only routers and ratios.
        lr: learning rate of the weights, or of LoRA in their place.
        weight_decay: of the weights; routers and ratios have none.
        router_lr: learning rate of the routers.
        ratio_lr: learning rate of the ratios; its unit is keep ratio a step.
        betas: Adam's.
        warmup: steps of linear warm-up.
        schedule: `constant`, or `cosine` down to 0 at the last step.
        clip: largest norm of the gradient of weights and routers; 0 is off.
        ema: decay of the exponential moving average of weights and routers; 0 is off.
        kind: `adamw`; `fused`, one kernel for the step; `adamw_8bit`, moments in 8 bits (torchao), a quarter of the
            memory that they take.
    """

    weights: str = "all"
    lr: float = 1e-4
    weight_decay: float = 0.0
    router_lr: float = 1e-3
    ratio_lr: float = 8e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 0
    schedule: str = "constant"
    clip: float = 1.0
    ema: float = 0.999
    kind: str = "adamw"

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise unknown("optimizer.kind", self.kind, OPTIMIZERS)
        if self.weights not in TRAINABLE:
            raise unknown("optimizer.weights", self.weights, TRAINABLE)
        if self.schedule not in ("constant", "cosine"):
            raise unknown("optimizer.schedule", self.schedule, ("constant", "cosine"))
        for name in ("lr", "router_lr", "ratio_lr", "weight_decay", "clip", "warmup"):
            if getattr(self, name) < 0:
                raise DiffratioError(f"optimizer.{name} {getattr(self, name)!r} must not be negative")
        if not 0 <= self.ema < 1:
            raise DiffratioError(f"optimizer.ema {self.ema!r} is outside [0, 1)")


@dataclass(frozen=True)
class LossSettings:
    """What is minimised, beside the objective's own settings.

    Args:
        timesteps: `iid`, `stratified` or `one_region`.
        distill: weight of the MSE to the frozen dense model's prediction; 0 is off.
        seed: of noise and levels.
    """

    timesteps: str = "stratified"
    distill: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.timesteps not in TIMESTEPS:
            raise unknown("objective.timesteps", self.timesteps, TIMESTEPS)
        if self.distill < 0:
            raise DiffratioError(f"objective.distill {self.distill!r} must not be negative")


@dataclass(frozen=True)
class GuardSettings:
    """What happens at a loss or gradient that is not finite.

    Args:
        nonfinite: `stop` ends the job; `skip` leaves that step's update out and goes on.
        max_skipped: skipped steps in a row after which `skip` ends the job too.
    """

    nonfinite: str = "stop"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.nonfinite not in NONFINITE:
            raise unknown("callbacks.nonfinite", self.nonfinite, NONFINITE)
        if self.max_skipped < 1:
            raise DiffratioError(f"callbacks.max_skipped {self.max_skipped!r} must be at least 1")


@dataclass(frozen=True)
class CallbackSettings(GuardSettings):
    """What happens beside the steps.

    Args:
        checkpoint_every: steps between resumable checkpoints; 0 keeps only the last.
        pictures_every: steps between sample grids and heat maps; 0 draws them at the end.
        pictures_n: samples of a grid.
        ratios_every: steps between rows of `ratios.csv` and looks at the routing's health.
        probe_n: held-out pictures for the loss before and after rounding.
        final_n: held-out pictures for the last validation loss.
    """

    checkpoint_every: int = 100
    pictures_every: int = 0
    pictures_n: int = 20
    ratios_every: int = 10
    probe_n: int = 100
    final_n: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("checkpoint_every", "pictures_every", "pictures_n", "ratios_every", "probe_n", "final_n"):
            least, value = int(name not in ("checkpoint_every", "pictures_every")), getattr(self, name)
            if not least <= value <= MOST_STEPS:
                raise DiffratioError(
                    f"callbacks.{name} {shortened(value)} must be at least {least} and at most {MOST_STEPS:,}"
                )


def callback_settings(cfg: Config) -> CallbackSettings:
    """Settings of what happens beside the steps; runs of earlier versions lack some."""
    known = {field.name for field in dataclasses.fields(CallbackSettings)}
    return typed(CallbackSettings, {key: value for key, value in cfg["callbacks"].items() if key in known}, "callbacks")
