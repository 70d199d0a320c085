"""Several processes of one job: who they are, and how an error in one of them ends them all."""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from diffratio.errors import DiffratioError, ReportedElsewhere

T = TypeVar("T")

# The others wait while the first process measures, which may take longer than the backends' 10 or 30 minutes.
_PATIENCE = timedelta(hours=24)


def process_state() -> Any | None:
    """Accelerate's state where there are several processes; asked only then, since asking starts a process group.

    Raises:
        DiffratioError: accelerate's state was made before the group and does not see all of it.
    """
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not started and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    # It looks for CPU processes only when told to.
    state = PartialState(cpu=not torch.accelerator.is_available(), **({} if started else {"timeout": _PATIENCE}))
    if not started:
        leave_group_at_exit()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world != state.num_processes:
        raise DiffratioError(
            f"accelerate sees {state.num_processes} of {world} processes, because its state is older than their "
            "group: make it afterwards, or pass distributed=False to sample everything in each process"
        )
    return state if world > 1 else None


def leave_group_at_exit() -> None:
    """Has this process leave its group when it exits; for groups of ours, and where no collective is under way then.

    Gloo's threads let go of the last collective's tensors when they find the time, for which they need the
    interpreter; where it is being taken down by then, they abort the process, whose exit code says so
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    gc.collect()  # a wrapped model in a cycle holds the group, and with it the threads
    time.sleep(0.1)  # for the threads of groups that a device mesh still holds


def usable_device(name: str, said: str) -> str:
    """The device of that name.

    Args:
        name: as torch takes it, or `auto`: a GPU where there is one.
        said: how it was asked for, for the message.

    Raises:
        DiffratioError: there is none here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise DiffratioError(f"{said} is not available here; `diffratio doctor` lists the devices") from None
    return name


class Team:
    """The processes of this job; a single one is a team of one and pays nothing for it."""

    def __init__(self) -> None:
        self._state = process_state()

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self._state is None else int(self._state.num_processes)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0 if self._state is None else int(self._state.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that measures, times and writes."""
        return self._state is None or bool(self._state.is_main_process)

    def device(self, wanted: str) -> str:
        """The device of this process: its own of several GPUs, where `wanted` names none of them.

        Args:
            wanted: `auto`, or a torch device string.

        Raises:
            DiffratioError: there is none of that name here.
        """
        if wanted in ("auto", "cuda") and self._state is not None and self._state.device.type == "cuda":
            return str(self._state.device)
        return usable_device(wanted, f"device={wanted!r}")

    def together(self, work: Callable[[], T]) -> T:
        """Every process does the same; an error in one ends all of them with one message.

        Raises:
            DiffratioError: what went wrong, in the first process; ReportedElsewhere in the others.
        """
        if self._state is None:
            return work()
        from accelerate.utils import gather_object

        result, error = _attempt(work)
        problems = [one for one in gather_object([_line(error)]) if one]
        if not problems:
            return result  # type: ignore[return-value]
        raise self._ended(error, problems[0])

    def on_main(self, work: Callable[[], T]) -> T:
        """The first process works while the others wait; all get the result, which is pickled, so keep it small.

        Raises:
            DiffratioError: what went wrong, in the first process; ReportedElsewhere in the others.
        """
        if self._state is None:
            return work()
        from accelerate.utils import broadcast_object_list

        result, error = _attempt(work) if self.is_main else (None, None)
        problem, answer = broadcast_object_list([_line(error), result])
        if problem:
            raise self._ended(error, problem)
        return answer

    def _ended(self, error: Exception | None, problem: str) -> Exception:
        if not self.is_main:
            return ReportedElsewhere(problem)
        return error or DiffratioError(problem)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the others must hear of it, or they wait for ever
        return None, error


def _line(error: Exception | None) -> str | None:
    if error is None:
        return None
    kind = "" if isinstance(error, DiffratioError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"
