"""How processes are started and end: Lightning's own launcher, torchrun on two nodes, what a failure leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets.config
import pytest
from ranks import free_port
from tiny_run import checkpoint_of, job

from diffratio.errors import DiffratioError, ReportedElsewhere, RunFailed
from diffratio.files import read_json
from diffratio.training.processes import SameStart, check_alike, check_started, ending_together

ROOT = Path(__file__).resolve().parents[2]
TWO = ["trainer=ddp", "trainer.devices=2", "data.batch_size=4", "method=mod"]


def start(words: Sequence[str], **more: str) -> subprocess.Popen[str]:
    """A program of its own, in the checkout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    environment["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_ends_all(data: Path, tmp_path: Path) -> None:
    """Lightning's watch would kill the first process when the second ends with 143."""
    run = tmp_path / "run"
    settings = ["trainer.max_steps=100000", "trainer.val_check_interval=100000", "trainer.log_every_n_steps=1"]
    process = start(["-m", "diffratio", "train", *job(data, run, *TWO, *settings)])
    log = run / "logs" / "metrics.csv"
    for _ in range(1500):
        if log.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert said.count("diffratio: terminated, the state is saved in") == 1, said
    assert checkpoint_of(run)["global_step"] >= 1
    assert not (run / "checkpoints" / "last.prev.ckpt").exists()


@pytest.mark.slow
def test_two_nodes_of_torchrun(data: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    settings = ["trainer.num_nodes=2", "trainer.devices=1", "data.batch_size=4", "trainer.max_steps=2", "method=mod"]
    nodes = [
        start(
            ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
            + ["--master-addr=127.0.0.1", f"--master-port={port}", "train.py", *job(data, run, *settings)]
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert read_json(run / "result.json", "result")["steps"] == 2


@pytest.mark.slow
def test_a_multirun_of_several_processes_is_refused(data: Path, tmp_path: Path) -> None:
    process = start(["train.py", "-m", *job(data, tmp_path / "run", *TWO, "seed=0,1")])
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, said
    assert "a multirun over 2 processes would start the whole sweep" in said and "hydra/launcher=slurm" in said
    assert not (tmp_path / "run").exists()


def test_a_failure_leaves_no_process_behind() -> None:
    lasting, ended = (subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(60)", ""))
    assert ended.wait(60) == 0
    procs = [lasting, ended]
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=procs)))
    try:
        with pytest.raises(RunFailed), ending_together(trainer, patience=0.2):
            raise RunFailed("the disk is full")
        assert lasting.wait(60) != 0
        assert not procs, "Lightning's watch must have nothing to look at"
    finally:
        lasting.kill()


def test_a_number_of_processes_that_is_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SimpleNamespace(num_devices=1, num_nodes=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiffratioError, match="torchrun has started 2 processes, and trainer.devices x"):
        check_started(trainer)
    check_started(SimpleNamespace(num_devices=1, num_nodes=2))


def test_processes_that_go_on_from_different_files_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(values: list[Any], own: Any) -> None:
        assert own == ("last.prev.ckpt", 400)
        values[:] = [own, ("last.ckpt", 500)]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    trainer: Any = SimpleNamespace(
        world_size=2, global_rank=0, global_step=400, strategy=SimpleNamespace(launcher=None)
    )
    with pytest.raises(RunFailed, match="the state to go on from of process 1 differs .* must see the same paths.out"):
        SameStart("last.prev.ckpt").on_train_start(trainer, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    def gather(values: list[Any], own: Any) -> None:
        values[:] = [own, own, "other", own]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    trainer: Any = SimpleNamespace(world_size=4, global_rank=rank, strategy=SimpleNamespace(launcher=None))
    kind = ReportedElsewhere if rank else RunFailed
    with pytest.raises(kind, match="schedule") as caught:
        check_alike(trainer, "the keep schedule", [[10]], "nothing is exported")
    assert rank or str(caught.value) == (
        "the keep schedule of process 2 differs from that of process 0, so nothing is exported"
    )
