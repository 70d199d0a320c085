"""One small data set and a few runs, shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import fashion_subset, train_tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the small data set; the copies that `datasets` makes stay inside the tests' folder."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield fashion_subset(tmp_path_factory.mktemp("fashion"))


@pytest.fixture(scope="session")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folder of a run of 8 steps without a break, by number of accumulated batches."""
    done: dict[int, Path] = {}

    def run(accumulate: int = 1) -> Path:
        if accumulate not in done:
            done[accumulate] = tmp_path_factory.mktemp("straight") / "run"
            train_tiny(data, done[accumulate], f"trainer.accumulate_grad_batches={accumulate}")
        return done[accumulate]

    return run
