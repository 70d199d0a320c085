"""Two processes on the CPU, whose batches fall into different regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing
from distributed_worker import work


@pytest.mark.slow  # tests/training/test_processes.py trains in two processes by default
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_with_different_regions_a_rank(tmp_path: Path, checkpointing: bool) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), checkpointing), nprocs=2)
