"""Processes that are killed or terminated for real, at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparing import DATA, light, make_checkpoints, settings, timeless
from killed_worker import CHANGES

import diffratio
from diffratio.evaluation.compare import compare_from_config

HERE = Path(__file__).parent


def start(folder: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """A process that compares."""
    paths = os.pathsep.join([str(Path(diffratio.__file__).parents[1]), str(HERE)])
    command = [sys.executable, str(HERE / "killed_worker.py"), str(folder), str(out), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[str], out: Path, written: int, delay: float, sign: int) -> tuple[int, str]:
    """Sends a signal some time after so many records stand there; exit code and standard error."""
    try:
        for _ in range(2000):
            if len(list((out / "records").glob("*.json"))) >= written or process.poll() is not None:
                break
            time.sleep(0.05)
        time.sleep(delay)
        process.send_signal(sign)
        return process.wait(timeout=60), process.communicate(timeout=60)[1]
    finally:
        process.kill()


@pytest.mark.slow
def test_killed_at_random_moments_and_rerun_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, out = make_checkpoints(tmp_path), tmp_path / "killed"
    draws = random.Random(int(os.environ.get("DIFFRATIO_TEST_SEED", time.time_ns())))
    moments = [(draws.randint(0, 2), draws.uniform(0, 0.05)), (draws.randint(3, 6), draws.uniform(0, 0.05))]
    for written, delay in moments:
        code, said = stop(start(tmp_path, out), out, written, delay, signal.SIGKILL)
        assert code == -signal.SIGKILL, (moments, said)
    light(monkeypatch, tmp_path)
    for folder in ("killed", "whole"):
        compare_from_config(settings(checkpoints, tmp_path / folder, **CHANGES), DATA.held_out)
    assert len(timeless(out)) == 15 and timeless(out) == timeless(tmp_path / "whole"), moments


def test_a_terminated_comparison_says_what_was_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, out = make_checkpoints(tmp_path), tmp_path / "stopped"
    code, said = stop(start(tmp_path, out, "halt"), out, 1, 0.0, signal.SIGTERM)
    assert code == 143 and "Traceback" not in said and said.strip().endswith("diffratio: terminated"), said
    statuses = [json.loads(path.read_text())["status"] for path in (out / "records").glob("*.json")]
    assert len(statuses) == 15 and "ok" in statuses and "cancelled" in statuses
    light(monkeypatch, tmp_path)
    compare_from_config(settings(checkpoints, out, **CHANGES), DATA.held_out)
    assert {record["status"] for record in timeless(out).values()} == {"ok"}
