"""Training jobs of several processes, as torchrun would start them, but forked from a server that has imported all."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets.config
import torch
from jobs import PROCESSES

from diffratio import cli
from diffratio.training.module import Training


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launch(
    words: Sequence[str], folder: Path, world: int = 2, per_node: int = 0, hook: tuple[Any, ...] | None = None
) -> list[tuple[int | None, str]]:
    """Runs `diffratio train` in several processes.

    Args:
        words: of the verb, the same for all.
        folder: for what they say.
        world: processes.
        per_node: of them on one node; 0 puts all on one.
        hook: name of a function of this module, and its arguments after the rank; called in every process first.

    Returns:
        Exit code and our own lines of standard error, of each.
    """
    folder.mkdir(exist_ok=True)
    port, cache = free_port(), str(datasets.config.HF_DATASETS_CACHE)
    said = [folder / f"said-{rank}.txt" for rank in range(world)]
    sizes = (world, per_node or world)
    group = [
        PROCESSES.Process(target=_rank, args=(list(words), str(said[rank]), rank, sizes, port, hook, cache))
        for rank in range(world)
    ]
    for process in group:
        process.start()
    until = time.monotonic() + 240
    for process in group:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    return [(code, own_lines(path.read_text())) for code, path in zip(codes, said, strict=True)]


def own_lines(said: str) -> str:
    """What diffratio itself says, or the traceback of a process that ended otherwise."""
    if "Traceback" in said:
        return said
    return "".join(f"{line}\n" for line in said.splitlines() if line.startswith("diffratio:"))


def _rank(
    words: list[str], said: str, rank: int, sizes: tuple[int, int], port: int, hook: tuple[Any, ...] | None, cache: str
) -> None:
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    handle = open(said, "w", buffering=1)  # noqa: SIM115 (stays open until the process ends)
    os.dup2(handle.fileno(), 2)
    sys.stderr = handle
    world, per_node = sizes
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
    found |= {"LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node, "GROUP_RANK": rank // per_node}
    os.environ.update({key: str(value) for key, value in found.items()} | {"TORCHELASTIC_RUN_ID": "tests"})
    if hook is not None:
        globals()[hook[0]](rank, *hook[1:])
    code = cli.main(["train", *words])
    handle.flush()
    os._exit(code)


def as_on_gpus(rank: int) -> None:
    """Lightning validates as with NCCL, in inference mode where that is on; with gloo it never does."""
    from lightning.pytorch.loops import utilities

    utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")  # type: ignore[assignment]


def terminate(rank: int, whom: int, step: int, number: int) -> None:
    """One of the processes gets a signal while a step is computed."""
    original = Training.training_step

    def interrupted(module: Training, *args: Any) -> Any:
        if rank == whom and module.global_step == step:
            os.kill(os.getpid(), signal.Signals(number))
        return original(module, *args)

    Training.training_step = interrupted  # type: ignore[method-assign]


def poison(rank: int, position: int) -> None:
    """The sample at a position of the stream gives a loss that is not finite, on whichever process it falls."""
    original = Training.training_step

    def poisoned(module: Training, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        batch["images"][batch["positions"] == position] = float("nan")
        return original(module, batch, index)

    Training.training_step = poisoned  # type: ignore[method-assign]


def part_ways(rank: int) -> None:
    """The second process freezes another schedule."""
    from diffratio.methods.diffcr import DiffCRMethod

    original = DiffCRMethod.freeze_

    def other(method: DiffCRMethod, schedule: Any) -> None:
        original(method, schedule)
        if rank == 1:
            method.bins = tuple((*row[:-1], 1) for row in method.bins)

    DiffCRMethod.freeze_ = other  # type: ignore[method-assign]
