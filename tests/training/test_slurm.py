"""SLURM's variables: a task of srun is one of several processes, a shell of salloc is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from tiny_run import train_tiny

from diffratio.errors import DiffratioError
from diffratio.files import configs_folder
from diffratio.training.processes import cluster_plugins

ALLOCATION = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "night",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ALLOCATION.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291"], ids=["script", "interactive", "batch"])
def test_a_shell_in_an_allocation_is_one_process(allocation: pytest.MonkeyPatch, step: str | None) -> None:
    if step is not None:
        allocation.setenv("SLURM_STEP_ID", step)
    (found,) = cluster_plugins()
    assert isinstance(found, LightningEnvironment) and found.world_size() == 1


def test_a_task_of_srun_is_one_of_several(allocation: pytest.MonkeyPatch) -> None:
    allocation.setenv("SLURM_STEP_ID", "0")
    (found,) = cluster_plugins()
    assert isinstance(found, SLURMEnvironment) and found.world_size() == 2 and not found.auto_requeue
    allocation.setenv("SLURM_NTASKS", "1")
    assert isinstance(cluster_plugins()[0], LightningEnvironment)
    for name in ALLOCATION:
        allocation.delenv(name)
    allocation.delenv("SLURM_STEP_ID")
    assert cluster_plugins() == []


def test_a_plain_run_in_an_allocation_trains(allocation: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    result = train_tiny(data, tmp_path / "run", "method=mod", "trainer.max_steps=2")
    assert result["steps"] == 2


def test_tasks_that_are_not_the_devices_are_one_line(
    allocation: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    allocation.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(DiffratioError, match="srun has started 2 processes, and") as caught:
        train_tiny(data, tmp_path / "run", "method=mod")
    assert "\n" not in str(caught.value)


def test_the_script_is_one_of_bash() -> None:
    script = configs_folder() / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "--signal=USR1@" in script.read_text(encoding="utf-8")
