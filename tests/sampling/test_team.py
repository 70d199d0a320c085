"""A process leaves its group before its interpreter goes, which gloo's threads must not outlive."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import exit_codes

# Its own check was registered first, so it comes last; without leaving, a fifth of such processes end with -6.
PROCESS = """
import atexit, os, pathlib
def gone():
    names = [task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    if any("gloo" in name for name in names):
        os._exit(9)
atexit.register(gone)
from diffratio.sampling.processes import Team
team = Team()
assert team.size == 2
assert team.together(lambda: 1) == 1 and team.on_main(lambda: 2) == 2
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_no_thread_of_gloo_is_left_at_exit() -> None:
    assert exit_codes(PROCESS) == [0, 0]
