"""Every test starts from the same draws, on one thread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# the same examples in every run; a busy machine is no failure
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist a file stays on one worker, since trained runs are shared in it; contract tests share nothing."""
    for item in items:
        if item.path.parent.name != "contract":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
