"""A job's processes: how they are started, what they share, and that they end alike."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import Callback
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor

from diffratio.errors import DiffratioError, ReportedElsewhere, RunFailed, unknown
from diffratio.training.settings import OptimizerSettings

STRATEGIES = ("auto", "ddp", "fsdp2")
_FSDP_PRECISIONS = ("32-true", "bf16-mixed")
APART = "nothing is exported: the processes have trained apart; look for other versions or data on their machines"
_ELSEWHERE = "nothing is trained: every process must see the same paths.output_dir, on a disk that the nodes share"
_OWN_STEPS = 2**32 - 16  # numbers from here on are SLURM's own steps: batch, extern, interactive


def check_processes(settings: Mapping[str, Any], optimizer: OptimizerSettings) -> None:
    """Checks what a config says of processes, before Lightning makes any.

    Args:
        settings: of the trainer; the precision is no longer `auto`.
        optimizer: of the job.

    Raises:
        DiffratioError: an unknown strategy, more processes than there are cores, settings that do not go together, or
            other nodes that nothing has started.
    """
    strategy, devices, nodes = settings["strategy"], settings["devices"], settings["num_nodes"]
    if strategy not in STRATEGIES:
        raise unknown("trainer.strategy", strategy, STRATEGIES)
    cores = os.cpu_count() or 1
    if settings["accelerator"] == "cpu" and type(devices) is int and devices > cores:
        raise DiffratioError(
            f"trainer.devices={devices} asks for more processes than the {cores} cores of this machine; lower it"
        )
    if type(nodes) is int and nodes > 1 and not (under_torchrun() or under_srun() or "NODE_RANK" in os.environ):
        raise DiffratioError(
            f"trainer.num_nodes={nodes} and nothing has started the processes of the other nodes: start the job on "
            f"every node with `torchrun --nnodes {nodes} --nproc_per_node N ... train.py`, or with srun"
        )
    if settings["precision"] in ("16-mixed", "16") and optimizer.kind == "fused":
        raise DiffratioError(
            "optimizer.kind=fused with trainer.precision=16-mixed would clip and judge gradients that are still "
            "scaled; take optimizer.kind=adamw or trainer.precision=bf16-mixed"
        )
    if strategy != "fsdp2":
        return
    if settings["precision"] not in _FSDP_PRECISIONS:
        raise DiffratioError(
            f"trainer.strategy=fsdp2 takes trainer.precision={' or '.join(_FSDP_PRECISIONS)}, and it is "
            f"{settings['precision']}"
        )
    if optimizer.kind == "adamw_8bit":
        raise DiffratioError(
            "optimizer.kind=adamw_8bit does not go with trainer.strategy=fsdp2, which shards the moments already; "
            "take optimizer.kind=adamw, or trainer.strategy=ddp"
        )


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return bool(TorchElasticEnvironment.detect())


def under_srun() -> bool:
    """Whether srun has started this process as one of its tasks.

    Shells of salloc and scripts of sbatch have most of SLURM's variables too, and are one process.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _OWN_STEPS and "SLURM_NTASKS" in os.environ


def cluster_plugins() -> list[ClusterEnvironment]:
    """What says who this process is, where Lightning would take a SLURM allocation for a job of srun."""
    if under_torchrun() or not any(name.startswith("SLURM_") for name in os.environ):
        return []
    if under_srun() and int(os.environ["SLURM_NTASKS"]) > 1:
        return [SLURMEnvironment(auto_requeue=False)]  # `Termination` saves, the script requeues
    return [LightningEnvironment()]


def check_started(trainer: Any) -> None:
    """Checks that Lightning means the processes that torchrun or srun has started.

    With fewer, each of them would train on its own and write into the same run folder.

    Raises:
        DiffratioError: it means another number.
    """
    name, variable = ("torchrun", "WORLD_SIZE") if under_torchrun() else ("srun", "SLURM_NTASKS")
    if not (under_torchrun() or under_srun()):
        return
    started, meant = int(os.environ[variable]), trainer.num_devices * trainer.num_nodes
    if started not in (1, meant):
        raise DiffratioError(
            f"{name} has started {started} processes, and trainer.devices x trainer.num_nodes is {trainer.num_devices} "
            f"x {trainer.num_nodes}; set trainer.devices to the processes of a node and trainer.num_nodes to the nodes"
        )


def strategy_of(name: str) -> Any:
    """What Lightning's Trainer takes for a strategy of ours."""
    if name != "fsdp2":
        return name
    from diffratio.training.sharding import ShardedStrategy

    return ShardedStrategy()


def release(trainer: Any) -> None:
    """Takes the processes that Lightning has started from its watch; to be called before they may end with a code.

    When one does, the watch kills the first process too, within five seconds: the job's own exit code and its one line
    would be lost.
    """
    launcher = trainer.strategy.launcher
    watched = getattr(launcher, "procs", None)
    if watched:
        launcher.procs = list(watched)
        watched.clear()


@contextlib.contextmanager
def ending_together(trainer: Any, patience: float = 20.0) -> Iterator[None]:
    """Leaves none of the processes that Lightning has started behind where the first one fails.

    Args:
        trainer: Lightning's.
        patience: seconds that they have to end by themselves; one may wait in a collective for the first one.
    """
    try:
        yield
    except BaseException:
        release(trainer)
        until = time.monotonic() + patience
        for process in getattr(trainer.strategy.launcher, "procs", None) or ():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        raise


def mean_over_processes(trainer: Any, value: Tensor) -> Tensor:
    """The mean of a scalar over all processes; they must ask together."""
    if trainer.world_size == 1:
        return value
    mean = trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean


def check_alike(trainer: Any, what: str, value: Any, otherwise: str) -> None:
    """Compares plain data of all processes.

    Args:
        trainer: Lightning's.
        what: the data, in words.
        value: of this process.
        otherwise: what follows where they differ, and the way out.

    Raises:
        RunFailed: on the first process, naming the others that differ from it; ReportedElsewhere on those.
    """
    if trainer.world_size == 1:
        return
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    different = [rank for rank, one in enumerate(values) if one != values[0]]
    if not different:
        return
    release(trainer)
    if trainer.global_rank:
        raise ReportedElsewhere(f"{what} differs between processes", RunFailed.exit_code)
    raise RunFailed(
        f"{what} of process {', '.join(map(str, different))} differs from that of process 0, so {otherwise}"
    )


class SameStart(Callback):
    """Has all processes go on from one state.

    Args:
        resumed: name of the checkpoint file that this one has found, or None.
    """

    def __init__(self, resumed: str | None) -> None:
        self.resumed = resumed

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Compares file and step, before any step is made."""
        check_alike(trainer, "the state to go on from", (self.resumed, trainer.global_step), _ELSEWHERE)
