"""Training processes that are killed or terminated for real, and disks that take no more."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job
from resuming import assert_same_end, metrics
from tiny_run import checkpoint_of, job, train_tiny

import diffratio
from diffratio.errors import DiffratioError, RunFailed
from diffratio.files import sha256
from diffratio.training import saving
from diffratio.training.saving import SafeCheckpointIO, previous, resumable

SEED = int(os.environ.get("DIFFRATIO_TEST_SEED", "0")) or time.time_ns() % 10**6
EVERY = ["callbacks.checkpoint_every=2", "callbacks.pictures_n=1"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train_tiny(data, run, *EVERY)
    return run


@pytest.mark.parametrize(
    ("step", "accumulate"),
    [
        pytest.param(2, 1, id="2", marks=pytest.mark.slow),
        pytest.param(3, 1, id="before a validation", marks=pytest.mark.slow),
        pytest.param(2, 2, id="half"),
    ],
)
def test_terminated_saves_the_step_and_resumes(
    data: Path, tmp_path: Path, straight: Callable[..., Path], step: int, accumulate: int
) -> None:
    """No periodic checkpoint is due: what is resumed is what the termination saved."""
    run = tmp_path / "run"
    words = [f"trainer.accumulate_grad_batches={accumulate}"]
    started = Job(job(data, run, *words), tmp_path, halt=step)
    started.reach(step)
    code, said = started.end(signal.SIGTERM)
    assert code == 143, said
    last = run / "checkpoints" / "last.ckpt"
    line = (
        f"diffratio: terminated, the state is saved in {str(last)!r}; "
        f"it goes on with the same command and paths.output_dir={run} ckpt_path=last"
    )
    assert said.strip().splitlines()[-1] == line and "Traceback" not in said
    assert checkpoint_of(run)["global_step"] == step + 1 and not (run / "result.json").exists()
    train_tiny(data, run, *words, "ckpt_path=last")
    assert_same_end(run, straight(accumulate))
    assert metrics(run) == metrics(straight(accumulate))


def test_the_command_itself_is_terminated(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(diffratio.__file__).parents[1]),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-P", "-m", "diffratio", "train", *job(data, run, "trainer.max_steps=100000")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(2000):
            if (run / "ratios.csv").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert said.strip().splitlines()[-1].startswith("diffratio: terminated, the state is saved in "), said
    saved = saving.read_resumable(run / "checkpoints" / "last.ckpt")
    assert saved["global_step"] >= 1


@pytest.mark.parametrize(
    "moment",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("write", "last.sha256", "last.prev.ckpt")), "last.ckpt"],
)
def test_killed_while_saving(data: Path, tmp_path: Path, whole: Path, moment: str) -> None:
    run = tmp_path / "run"
    code, said = Job(job(data, run, *EVERY), tmp_path, ("die_in_save", 3, moment)).end()
    assert code == -signal.SIGKILL, said
    found = resumable(run)
    assert found is not None and saving.read_resumable(found)["global_step"] == 4
    assert found.name == ("last.prev.ckpt" if moment == "last.ckpt" else "last.ckpt")
    train_tiny(data, run, *EVERY, "ckpt_path=last")
    assert_same_end(run, whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "last.ckpt",
        "last.prev.ckpt",
        "last.sha256",
    ]


@pytest.mark.parametrize("damage", ["torn", pytest.param("bit", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run"
    started = Job(job(data, run, *EVERY), tmp_path, halt=7)
    started.reach(7)
    started.end(signal.SIGKILL)
    last = run / "checkpoints" / "last.ckpt"
    raw = bytearray(last.read_bytes())
    if damage == "bit":
        raw[len(raw) // 2] ^= 1
    last.write_bytes(raw if damage == "bit" else raw[: len(raw) // 2])
    capsys.readouterr()
    train_tiny(data, run, *EVERY, "ckpt_path=last")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffratio:")]
    assert len(lines) == 1 and f"checkpoint {str(last)!r} cannot be read (" in lines[0]
    assert lines[0].endswith(f"going on from {str(previous(last))!r} (step 4)"), lines
    assert_same_end(run, whole)


def saved(path: Path, step: int) -> dict[str, Any]:
    """A checkpoint as small as can be."""
    return {"state_dict": {"a": torch.full((1000,), float(step))}, "callbacks": {}, "global_step": step}


def test_a_torn_file_never_replaces_the_good_one_before(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    first = SafeCheckpointIO()
    for step in (1, 2):
        first.save_checkpoint(saved(last, step), last)
    last.write_bytes(last.read_bytes()[:100])
    SafeCheckpointIO().save_checkpoint(saved(last, 3), last)
    assert [saving.read_resumable(path)["global_step"] for path in (last, previous(last))] == [3, 1]
    assert (last.parent / "last.sha256").read_text().split() == [sha256(last), sha256(previous(last))]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk is to a process: writing beyond fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    plugin = SafeCheckpointIO()
    plugin.save_checkpoint(saved(last, 1), last)
    with largest_file(1000), pytest.raises(RunFailed) as caught:
        plugin.save_checkpoint(saved(last, 2), last)
    assert str(caught.value).startswith(f"checkpoint {str(last)!r} cannot be written (File too large); ")
    assert f"the last good checkpoint is {str(last)!r} (ckpt_path=last)" in str(caught.value)
    assert saving.read_resumable(last)["global_step"] == 1
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "last.sha256"]
    plugin.save_checkpoint(saved(last, 3), last)  # room was made
    assert saving.read_resumable(last)["global_step"] == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)])
def test_a_disk_full_in_training_is_one_line(data: Path, tmp_path: Path, whole: Path, code: int) -> None:
    """From the third save on nothing can be written any more, tables included."""
    run = tmp_path / "run"

    exit_code, said = Job(job(data, run, *EVERY), tmp_path, ("refuse_writing", 3, code, str(run))).end()
    assert exit_code == 1, said
    lines = [line for line in said.splitlines() if line.strip()]
    last = run / "checkpoints" / "last.ckpt"
    assert lines[-1].startswith(f"diffratio: checkpoint {str(last)!r} cannot be written ({os.strerror(code)}); "), said
    assert "Traceback" not in said and checkpoint_of(run)["global_step"] == 4
    train_tiny(data, run, *EVERY, "ckpt_path=last")
    assert_same_end(run, whole)


def test_an_explicit_path_must_match_its_checksum(data: Path, tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(saved(last, 1), last)
    torch.save(saved(last, 2), last)
    with pytest.raises(DiffratioError, match="its checksum is not in last.sha256"):
        train_tiny(data, tmp_path / "run", f"ckpt_path={last}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments(data: Path, tmp_path: Path, whole: Path) -> None:
    """Each run is killed once, at any moment from its first step to its end, and resumed."""
    draws = random.Random(SEED)
    for number in range(20):
        run = tmp_path / f"run{number}"
        moment = draws.randint(0, 7), draws.uniform(0, 0.15)
        started = Job(job(data, run, *EVERY), tmp_path / f"job{number}", pause=0.02)
        started.reach(moment[0])
        time.sleep(moment[1])
        code, said = started.end(signal.SIGKILL)
        assert code == -signal.SIGKILL, (SEED, moment, said)
        train_tiny(data, run, *EVERY, "ckpt_path=last")
        assert_same_end(run, whole)
