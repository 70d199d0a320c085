"""Coverage-guided fuzzing of every reader of a shared file, each in a process of its own, which libFuzzer ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_documents import KINDS

RUNS = 2000


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "weights", "config"])
def test_readers_read_or_refuse_whatever_reaches_new_lines(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install 'diffratio[fuzz]'")
    command = [sys.executable, str(Path(__file__).with_name("guided.py")), kind, str(tmp_path), f"-runs={RUNS}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and f"#{RUNS}" in done.stderr, done.stderr[-3000:]
