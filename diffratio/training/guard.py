"""Stops, or steps over, an update whose loss or gradient is not finite, before it reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio.errors import ReportedElsewhere, RunFailed
from diffratio.training.processes import release
from diffratio.training.saving import last_good
from diffratio.training.settings import GuardSettings

_NAMED = 8  # samples that a message names one by one


@dataclass(frozen=True)
class Seen:
    """One batch of a step, still on its device.

    Args:
        loss: scalar, everything that is minimised.
        samples: loss of each sample (B,).
        positions: of the samples in the training stream.
    """

    loss: Tensor
    samples: Tensor
    positions: Sequence[int]

    def bad(self) -> list[int]:
        """Positions of the samples whose loss is not finite; all of them where only the total is not."""
        if torch.isfinite(self.loss):
            return []
        wrong = (~torch.isfinite(self.samples)).tolist()
        return [one for one, is_bad in zip(self.positions, wrong, strict=True) if is_bad] or list(self.positions)


class NonFiniteGuard:
    """Judges every optimizer step once, from its losses and gradient norms; one read of the device a step.

    Args:
        settings: what to do.

    Attributes:
        skipped: steps whose update was left out, over the whole run.
        in_a_row: of them, up to the present step.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped = self.in_a_row = 0
        self._batches: list[Seen] = []

    def see(self, loss: Tensor, samples: Tensor, positions: Sequence[int]) -> None:
        """Notes one (micro-)batch of the step; reads nothing."""
        self._batches.append(Seen(loss.detach(), samples.detach(), positions))

    def passes(self, trainer: Any, norms: Sequence[Tensor]) -> bool:
        """Whether the step's update may be made.

        Args:
            trainer: Lightning's, or what stands for it.
            norms: of the step's gradients, summed over processes where there are several.

        Raises:
            RunFailed: it may not, and the settings say to stop.
        """
        batches, self._batches = self._batches, []
        total = torch.stack([one.float() for one in (*norms, *(batch.loss for batch in batches))]).sum()
        if trainer.world_size > 1:  # a loss is each process's own; they must agree
            total = trainer.strategy.reduce(total, reduce_op="sum")
        if bool(torch.isfinite(total)):
            self.in_a_row = 0
            return True
        if trainer.world_size > 1:
            release(trainer)  # from here on all processes may end
        of_loss = _gathered(trainer, [position for batch in batches for position in batch.bad()])
        if not of_loss and _scale(trainer) > 1:  # fp16: the scaler tries large scales and steps back by itself
            return False
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        stop = self.settings.nonfinite == "stop"
        if stop or self.in_a_row >= self.settings.max_skipped:
            if getattr(trainer, "global_rank", 0):
                raise ReportedElsewhere("a loss or gradient is not finite", RunFailed.exit_code)
            samples = of_loss or [position for batch in batches for position in batch.positions]
            raise RunFailed(self._message(trainer, batches, bool(of_loss), samples))
        return False

    def _message(self, trainer: Any, batches: Sequence[Seen], of_loss: bool, samples: Sequence[int]) -> str:
        values = [float(batch.loss) for batch in batches]
        bad = next((value for value in values if value - value != 0), None)  # inf - inf and nan - nan are nan
        what = f"the loss is {'not finite' if bad is None else bad}" if of_loss else "the gradient is not finite"
        checkpoints = getattr(getattr(trainer, "checkpoint_callback", None), "dirpath", None)
        times = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
        advice = "lower optimizer.lr" + ("" if times else ", or step over it with callbacks.nonfinite=skip")
        return (
            f"{what} at step {trainer.global_step}{times} (samples {_named(samples, trainer)}); "
            f"{last_good(Path(checkpoints).parent if checkpoints else None)}; {advice}"
        )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from a checkpoint."""
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


def _gathered(trainer: Any, own: list[int]) -> list[int]:
    """The lists of all processes, joined."""
    if trainer.world_size == 1:
        return own
    lists: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(lists, own)
    return sorted(position for one in lists for position in one)


def _scale(trainer: Any) -> float:
    """Loss scale of fp16 training; 0 in other precisions."""
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 0.0


def _named(positions: Sequence[int], trainer: Any) -> str:
    """Positions in the training stream, and the rows of the data that stand there."""
    shown, more = positions[:_NAMED], len(positions) - _NAMED
    text = ", ".join(map(str, shown)) + (f" and {more} more up to {positions[-1]}" if more > 0 else "")
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "train_rows"):
        return text
    rows = ", ".join(map(str, data.train_rows(shown)))
    return f"{text} of the stream, rows {rows}{' ...' if more > 0 else ''} of split {data.train_split!r}"
