"""Two processes give the records of one, and end together when one of them fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comparing import DATA, light, make_checkpoints, settings, timeless

import diffratio
from diffratio.evaluation.compare import compare_from_config

HERE = Path(__file__).parent


def launch(folder: Path, out: Path, breaks: str = "") -> list[tuple[int, str]]:
    """Exit code and standard error of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(Path(diffratio.__file__).parents[1]), str(HERE)])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "compare_worker.py"), str(folder), str(out), breaks]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()


def close(one: Any, other: Any) -> bool:
    """Equal but for 1e-5."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-5, abs=1e-5) if isinstance(one, float) else one == other


def test_two_processes_give_the_records_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = make_checkpoints(tmp_path)
    done = launch(tmp_path, tmp_path / "two")
    assert [code for code, _ in done] == [0, 0], done
    assert "mod at 0.8" in done[0][1] and "mod at 0.8" not in done[1][1]
    light(monkeypatch, tmp_path)
    config = settings(checkpoints, tmp_path / "one", routed=[checkpoints["routed"]])
    compare_from_config(config, DATA.held_out)
    one, two = timeless(tmp_path / "one"), timeless(tmp_path / "two")
    for record in (*one.values(), *two.values()):
        record["provenance"].pop("device")  # it names the threads
    assert len(one) == 3 and close(one, two)


@pytest.mark.parametrize(
    ("breaks", "codes"),
    [
        ("loading", [2, 3]),
        ("keeping", [2, 3]),
        pytest.param("writing", [2, 3], marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_both(tmp_path: Path, breaks: str, codes: list[int]) -> None:
    make_checkpoints(tmp_path)
    done = launch(tmp_path, tmp_path / "out", breaks)
    assert [code for code, _ in done] == codes, done
    assert "the disk is full" in done[0][1]
