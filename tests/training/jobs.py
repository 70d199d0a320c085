"""Training jobs in processes of their own, which report their steps, to be killed or hindered."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import datasets.config
import torch

from diffratio import cli
from diffratio.training import build
from diffratio.training.module import Training

# a server that has imported everything and run nothing forks them: importing anew takes longer than training
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, build.__name__])


class Job:
    """A `diffratio train` of its own process.

    Args:
        words: of the verb.
        folder: for what it says.
        hindrance: name of a function of this module, and its arguments; called in the process first.
        pause: seconds added to a step.
        halt: step at which it waits for `end`; -1 waits at none.
    """

    def __init__(
        self,
        words: list[str],
        folder: Path,
        hindrance: tuple[Any, ...] | None = None,
        pause: float = 0.0,
        halt: int = -1,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.steps, self.said = folder / "steps.txt", folder / "said.txt"
        cache = str(datasets.config.HF_DATASETS_CACHE)
        files = str(self.steps), str(self.said)
        self.process = PROCESSES.Process(target=_train, args=(words, *files, hindrance, pause, halt, cache))
        self.process.start()

    def reach(self, step: int) -> None:
        """Waits until a step is under way, or the process has ended."""
        for _ in range(9000):
            reported = len(self.steps.read_text().splitlines()) if self.steps.exists() else 0
            if reported > step or self.process.exitcode is not None:
                return
            time.sleep(0.01)
        self.process.kill()
        raise AssertionError(f"step {step} was not reached: {self.said.read_text()}")

    def end(self, sign: int | None = None) -> tuple[int | None, str]:
        """Sends a signal; exit code and standard error."""
        if sign is not None and self.process.pid is not None:
            os.kill(self.process.pid, sign)
            _go(self.steps).touch()
        self.process.join(120)
        code = self.process.exitcode
        self.process.kill()
        return code, self.said.read_text()


def _go(steps: str | Path) -> Path:
    """What a job at its halt waits for."""
    return Path(steps).with_name("go")


def _train(
    words: list[str], steps: str, said: str, hindrance: tuple[Any, ...] | None, pause: float, halt: int, cache: str
) -> None:
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    # stays open until the process ends
    handle = open(said, "w", buffering=1)  # noqa: SIM115
    os.dup2(handle.fileno(), 2)
    sys.stderr = handle
    original = Training.optimizer_step

    def reporting(module: Training, *args: Any, **kwargs: Any) -> None:
        with open(steps, "a") as lines:
            lines.write(f"{module.global_step}\n")
        time.sleep(pause)
        until = time.monotonic() + 60
        while module.global_step == halt and not _go(steps).exists() and time.monotonic() < until:
            time.sleep(0.01)
        original(module, *args, **kwargs)

    Training.optimizer_step = reporting  # type: ignore[method-assign]
    if hindrance is not None:
        globals()[hindrance[0]](*hindrance[1:])
    code = cli.main(["train", *words])
    handle.flush()
    os._exit(code)


def die_in_save(number: int, moment: str) -> None:
    """SIGKILLs the process in its n-th save: with half of the file written, or before a file is renamed to `moment`."""
    saves = 0
    save, replace = torch.save, os.replace

    def half(document: Any, handle: Any) -> None:
        nonlocal saves
        saves += 1
        save(document, handle)
        if saves == number and moment == "write":
            handle.truncate(handle.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def renaming(source: Any, target: Any) -> None:
        if saves == number and Path(target).name == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    torch.save = half  # type: ignore[assignment]
    os.replace = renaming  # type: ignore[assignment]


def refuse_writing(number: int, code: int, folder: str) -> None:
    """From the n-th save on nothing can be written into the folder any more, tables included."""
    saves = 0
    save, opened = torch.save, builtins.open

    def refusing(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(folder) and set(mode) & set("wa"):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, mode, *args, **kwargs)

    def failing(document: Any, handle: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == number:
            builtins.open = refusing  # type: ignore[assignment]
            raise OSError(code, os.strerror(code))
        save(document, handle)

    torch.save = failing  # type: ignore[assignment]
