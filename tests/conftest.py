"""Every test starts from the same draws, on one thread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# the same examples in every run; a busy machine is no failure
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
