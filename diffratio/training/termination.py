"""SIGTERM, or SLURM's warning SIGUSR1, while training: the step is finished, its state saved, and the job ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from diffratio.training.module import Training
from diffratio.training.processes import release
from diffratio.training.saving import LAST, present


class Termination(Callback):
    """Saves at the end of the step in which SIGTERM or SIGUSR1 comes, to any of the processes, then leaves the loop.

    Lightning's own handler stops after a micro-batch and saves nothing, and talks to other processes from inside the
    handler. This one takes its place while steps run. A job script requeues (`configs/slurm.sbatch`); where a launcher
    listens to SIGUSR1 already, it is left to that.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints" / LAST
        self.requested, self.saved_step, self.last_step = False, -1, 0

    def on_train_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            signal.signal(signal.SIGTERM, self._request)  # Lightning puts back what it found before the fit
            if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
                signal.signal(signal.SIGUSR1, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True

    def on_train_batch_end(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.last_step:  # an accumulated micro-batch: its gradient could not be saved
            return
        self.last_step = trainer.global_step
        if trainer.world_size > 1:  # saving takes all processes together
            self.requested = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        if self.requested:
            release(trainer)
            trainer.save_checkpoint(self.path, weights_only=False)
            self.saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        # not where it was saved: the step's log and a validation that is due come after that
        if self.saved_step == trainer.global_step:
            raise SIGTERMException


def way_on(folder: Path) -> str:
    """The line for a job that was terminated."""
    found = present(folder)
    if found is None:
        return "terminated before the first checkpoint; give the same command again"
    return (
        f"terminated, the state is saved in {str(found)!r}; it goes on with the same command and "
        f"paths.output_dir={folder} ckpt_path=last"
    )
