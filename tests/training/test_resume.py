"""A run that is cut and resumed ends exactly where the uncut one does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_equal, metrics
from tiny_run import checkpoint_of, rows_of, train_tiny
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.training.module import Training
from diffratio.training.run import export_run


class Cut(RuntimeError):
    """The power fails."""


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the first batch of a step fail."""
    original = Training.training_step

    def failing(self: Training, batch: dict[str, Tensor], index: int) -> Tensor:
        if self.global_step == step:
            raise Cut
        return original(self, batch, index)

    monkeypatch.setattr(Training, "training_step", failing)


def train_with_a_cut(
    data: Path, run: Path, every: int, cut: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    overrides = [f"callbacks.checkpoint_every={every}", f"trainer.accumulate_grad_batches={accumulate}"]
    with monkeypatch.context() as patch:
        cut_at(cut, patch)
        with pytest.raises(Cut):
            train_tiny(data, run, *overrides)
    assert not (run / "result.json").exists() and not (run / "export").exists()
    assert checkpoint_of(run)["global_step"] == every
    return train_tiny(data, run, *overrides, "ckpt_path=last")


@pytest.mark.parametrize(
    ("every", "cut", "accumulate"),
    [
        pytest.param(3, 3, 1, id="before the freeze"),
        pytest.param(3, 3, 2, id="before the freeze, accumulating", marks=pytest.mark.slow),
        pytest.param(3, 4, 1, id="freeze done twice", marks=pytest.mark.slow),
        pytest.param(3, 4, 2, id="freeze done twice, accumulating"),
        pytest.param(5, 7, 1, id="after the freeze"),
        pytest.param(5, 7, 2, id="after the freeze, accumulating", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uncut(
    data: Path,
    tmp_path: Path,
    straight: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    cut: int,
    accumulate: int,
) -> None:
    run, whole = tmp_path / "run", straight(accumulate)
    result = train_with_a_cut(data, run, every, cut, accumulate, monkeypatch)
    found, expected = checkpoint_of(run), checkpoint_of(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "diffratio"):
        assert_equal(found[key], expected[key], key)
    assert_equal(found["callbacks"]["WeightAverage"], expected["callbacks"]["WeightAverage"], "average")
    assert metrics(run) == metrics(whole)
    assert (run / "ratios.csv").read_text() == (whole / "ratios.csv").read_text()
    reference = json.loads((whole / "result.json").read_text())
    for key in ("schedule", "rounding", "val_loss", "val_loss_regions", "macs_fraction", "steps"):
        assert result[key] == reference[key], key


def test_a_finished_run_goes_on_for_more_steps(data: Path, tmp_path: Path) -> None:
    """4 steps and 2 more consume the same samples as 6: a fixed method has no ramp that depends on their number."""
    overrides = ["method=mod", "trainer.val_check_interval=100"]
    train_tiny(data, tmp_path / "parts", *overrides, "trainer.max_steps=4")
    train_tiny(data, tmp_path / "parts", *overrides, "trainer.max_steps=6", "ckpt_path=last")
    train_tiny(data, tmp_path / "whole", *overrides, "trainer.max_steps=6")
    found, expected = checkpoint_of(tmp_path / "parts"), checkpoint_of(tmp_path / "whole")
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_equal(found[key], expected[key], key)
    losses = [
        [(row["step"], row["train/diffusion_loss"]) for row in metrics(tmp_path / name) if row["train/diffusion_loss"]]
        for name in ("parts", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_resuming_a_finished_run_changes_nothing(data: Path, tmp_path: Path) -> None:
    overrides = ["trainer.max_steps=4", "method=mod"]
    train_tiny(data, tmp_path / "run", *overrides)
    before = checkpoint_of(tmp_path / "run")
    result = train_tiny(data, tmp_path / "run", *overrides, "ckpt_path=last")
    assert result["steps"] == 4
    assert_equal(checkpoint_of(tmp_path / "run")["state_dict"], before["state_dict"])
    assert len(metrics(tmp_path / "run")) == 5  # 4 steps, 1 validation


def test_an_unfrozen_run_is_not_exported(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    cut_at(3, monkeypatch)
    with pytest.raises(Cut):
        train_tiny(data, run, "callbacks.checkpoint_every=2")
    with pytest.raises(DiffratioError, match=r"still learned \(step 2\); resume with ckpt_path=last"):
        export_run(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_not_exported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at(1, monkeypatch)
    with pytest.raises(Cut):
        train_tiny(data, tmp_path / "run")
    with pytest.raises(DiffratioError, match="no checkpoint yet"):
        export_run(str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.fixture
def short(data: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    train_tiny(data, tmp_path / "run", "trainer.max_steps=2", "method=mod", "callbacks.checkpoint_every=1")
    return tmp_path / "run"


def test_without_a_whole_checkpoint_there_is_one_error(data: Path, short: Path, tmp_path: Path) -> None:
    for name in ("last.ckpt", "last.prev.ckpt"):
        path = short / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-1000])
    before = {file: file.stat().st_mtime_ns for file in short.rglob("*") if file.is_file()}
    with pytest.raises(DiffratioError, match="last.ckpt' cannot be read"):
        train_tiny(data, short, "ckpt_path=last")
    with pytest.raises(DiffratioError, match="last.ckpt' cannot be read"):
        export_run(str(short), str(tmp_path / "out"))
    assert {file: file.stat().st_mtime_ns for file in short.rglob("*") if file.is_file()} == before


def test_a_checkpoint_of_another_model_is_one_error(data: Path, short: Path, tmp_path: Path) -> None:
    path = short / "checkpoints" / "last.ckpt"
    for override in ("backbone.config.num_layers=2", "backbone.config.attention_head_dim=8", "method=dense"):
        with pytest.raises(DiffratioError, match="the checkpoint does not fit this run's backbone and method"):
            train_tiny(data, tmp_path / "other", "method=mod", override, f"ckpt_path={path}")
    with pytest.raises(DiffratioError, match="is no file"):
        train_tiny(data, tmp_path / "other", "ckpt_path=nowhere.ckpt")
    other = tmp_path / "weights.ckpt"
    torch.save({"weights": torch.zeros(1)}, other)
    with pytest.raises(DiffratioError, match="cannot be read .*it has no"):
        train_tiny(data, tmp_path / "other", f"ckpt_path={other}")


def test_a_line_cut_short_in_the_log_is_dropped(data: Path, short: Path) -> None:
    path = short / "logs" / "metrics.csv"
    with open(path, newline="") as handle:
        header = next(csv.reader(handle))
    path.write_text(path.read_text() + ",".join(["0"] * (header.index("step") + 1)))
    train_tiny(data, short, "trainer.max_steps=4", "method=mod", "ckpt_path=last")
    steps = [int(row["step"]) for row in rows_of(path) if row["train/diffusion_loss"]]
    assert steps == [0, 1, 2, 3]
