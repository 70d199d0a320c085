"""A long run holds no more than a short one, and what has ended leaves no file, thread or process behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import column, train_tiny

import diffratio
from diffratio.backbones import get_backbone
from diffratio.training.module import Training
from tests.footprint import Footprint, assert_steady, footprint

BUSY = [
    "method=diffcr",
    "trainer.val_check_interval=4",
    "callbacks.pictures_every=4",
    "callbacks.checkpoint_every=4",
    "callbacks.ratios_every=2",
    "callbacks.pictures_n=1",
    "callbacks.probe_n=4",
    "callbacks.final_n=4",
    "budget.steps=2",
    "optimizer.ratio_lr=0.01",
]
FEW = ["trainer.max_steps=4", *BUSY]
SPARE = 10  # objects; of a leak there are 12, one a step, and of a thing that a run leaves behind mostly more
Counting = Callable[..., dict[int, Footprint]]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Counts before these steps of the next run; gradients of the one before are there unless it was validated."""
    found: dict[int, Footprint] = {}

    def counting(*steps: int) -> dict[int, Footprint]:
        def count(module: Training, *args: Any) -> None:
            if module.global_step in steps:
                found[module.global_step] = footprint()

        monkeypatch.setattr(Training, "on_train_batch_start", count)
        return found

    return counting


def test_steps_add_nothing_and_neither_does_a_second_run(data: Path, tmp_path: Path, at: Counting) -> None:
    """Pictures, validation, checkpoints, tables and learned ratios are all on."""
    found = at(5, 17)
    train_tiny(data, tmp_path / "first", *BUSY, "trainer.max_steps=18", "budget.freeze=1")
    assert_steady(found[5], found[17], objects=SPARE)
    assert len(list((tmp_path / "first" / "pictures").glob("samples-*"))) == 5
    before = footprint()
    train_tiny(data, tmp_path / "second", *FEW)
    assert_steady(before, footprint(), objects=SPARE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_thousand_steps(data: Path, tmp_path: Path, at: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    found = at(999, 1499, 1999, 2499, 2999)
    often = [one for one in BUSY if not one.endswith("=4")]
    every = [f"{key}=100" for key in ("trainer.val_check_interval", "callbacks.pictures_every")]
    run, last = tmp_path / "run", ["trainer.max_steps=3000", "callbacks.checkpoint_every=100", "budget.freeze=0.9"]
    train_tiny(data, run, *often, *every, *last, "backbone.config.num_layers=1", "data.num_workers=1")
    with capsys.disabled():
        print(*(f"step {step}: {one}" for step, one in found.items()), sep="\n")
    assert len(column(run, "train/diffusion_loss")) == 3000
    assert_steady(found[999], found[2999], objects=100)


def _train(data: Path, folder: Path) -> Callable[[int], object]:
    return lambda turn: train_tiny(data, folder / f"run{turn}", *FEW, "data.num_workers=2")


def _compare(data: Path, folder: Path) -> Callable[[int], object]:
    from diffratio.evaluation.compare.running import compare_from_config
    from tests.evaluation.comparing import DATA, make_checkpoints, settings

    checkpoints = make_checkpoints(folder)
    return lambda turn: compare_from_config(settings(checkpoints, folder / f"out{turn}"), DATA.held_out)


def _precompute(data: Path, folder: Path) -> Callable[[int], object]:
    from diffratio.data.precompute import precompute
    from tests.captioned import captioned_parquet
    from tests.data.test_precompute import config
    from tests.text_pipelines import tiny_pipeline

    tiny_pipeline("alpha").save_pretrained(folder / "pipe")
    captioned_parquet(folder / "data")
    return lambda turn: precompute(config(folder, folder / f"latents{turn}"))


def _search(data: Path, folder: Path) -> Callable[[int], object]:
    from diffratio.search import search
    from tests.search.test_search import config

    weights = diffratio.export(get_backbone("dit").tiny(), folder / "tiny", card={"objective": "flow"})
    return lambda turn: search(config(str(weights), folder / f"out{turn}"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", [_train, _compare, _precompute, _search], ids=lambda one: one.__name__[1:])
def test_a_second_call_adds_nothing(
    verb: Callable[[Path, Path], Callable[[int], object]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker processes, files and threads are closed. What the first two calls load for good stays."""
    from tests.evaluation.comparing import light

    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path / "cache"))
    light(monkeypatch, tmp_path)
    torch.manual_seed(0)
    call = verb(data, tmp_path)
    begun = footprint().children  # a fork server of other tests may stand
    for turn in (0, 1):
        call(turn)
    before = footprint()
    call(2)
    # torch remembers up to 128 of the storages that loader workers have sent, by a weak reference each
    assert_steady(before, footprint(), objects=2 * 128 + SPARE if verb is _train else SPARE)
    assert before.children == begun
