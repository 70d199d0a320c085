"""Numbers that are not finite never reach the weights or a checkpoint; routing that learns nothing is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from resuming import assert_equal
from tiny_run import checkpoint_of, column, job, train_tiny
from torch import Tensor

from diffratio.data.images import ImageData
from diffratio.errors import DiffratioError, RunFailed
from diffratio.training import build, trainer
from diffratio.training.module import Training
from diffratio.training.run import compose, plain_config
from diffratio.training.saving import SafeCheckpointIO

PLAIN = ["method=mod", "trainer.max_steps=4", "trainer.val_check_interval=100", "callbacks.checkpoint_every=1"]


def poison(monkeypatch: pytest.MonkeyPatch, positions: set[int], what: str = "loss") -> None:
    """Makes samples at these positions of the stream give a loss, or only a gradient, that is not finite."""
    original = Training.training_step

    def poisoned(self: Training, batch: dict[str, Tensor], index: int) -> Tensor:
        hit = [place for place, one in enumerate(batch["positions"].tolist()) if one in positions]
        if not hit:
            return original(self, batch, index)
        if what == "loss":
            batch["images"][hit] = float("nan")
            return original(self, batch, index)
        loss = original(self, batch, index)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Training, "training_step", poisoned)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Position 19 is in the third batch of 8: step 2, or the first half of step 1 where two are accumulated."""
    run, step = tmp_path / "run", 2 // accumulate
    poison(monkeypatch, {19})
    with pytest.raises(RunFailed) as caught:
        train_tiny(data, run, *PLAIN, f"trainer.accumulate_grad_batches={accumulate}")
    said = str(caught.value)
    assert said.startswith(f"the loss is nan at step {step} (samples 19 of the stream, rows "), said
    assert f"the last good checkpoint is {str(run / 'checkpoints' / 'last.ckpt')!r} (ckpt_path=last)" in said
    assert caught.value.exit_code == 1 and "\n" not in said
    saved = checkpoint_of(run)
    assert saved["global_step"] == step
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_the_rows_that_a_message_names_are_the_pictures(data: Path) -> None:
    cfg = plain_config(compose("train", job(data, Path("unused"), "data.flip=false")))
    images: Any = ImageData(**cfg["data"])
    batch = next(iter(images.train_dataloader()))
    rows = images.train_rows(batch["positions"].tolist())
    pixels = images._pair()[0].pixels(torch.tensor(rows).numpy())  # the subset's rows are in the source's order
    assert torch.equal(torch.from_numpy(pixels).float() / 127.5 - 1, batch["images"])
    later = images.train_rows([200 + one for one in batch["positions"].tolist()])  # the next epoch of 200
    assert len(set(rows)) == 8 and rows != later


def test_a_gradient_that_is_not_finite_stops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {8}, "gradient")
    expected = r"the gradient is not finite at step 1 \(samples 8, 9, 10, 11, 12, 13, 14, 15 of the stream, rows "
    with pytest.raises(RunFailed, match=expected):
        train_tiny(data, tmp_path / "run", *PLAIN, "optimizer.clip=0")
    assert checkpoint_of(tmp_path / "run")["global_step"] == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_nothing_and_is_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, accumulate: int
) -> None:
    kept: dict[int, Any] = {}
    original = SafeCheckpointIO.save_checkpoint

    def keeping(self: SafeCheckpointIO, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        original(self, checkpoint, path, **options)
        kept[checkpoint["global_step"]] = torch.load(path, weights_only=True)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", keeping)
    poison(monkeypatch, {8 * accumulate}, what)  # the first batch of step 1
    run = tmp_path / "run"
    train_tiny(data, run, *PLAIN, "callbacks.nonfinite=skip", f"trainer.accumulate_grad_batches={accumulate}")
    assert_equal(kept[2]["state_dict"], kept[1]["state_dict"], "weights")
    assert_equal(kept[2]["optimizer_states"][0]["state"], kept[1]["optimizer_states"][0]["state"], "moments")
    changed = [not torch.equal(kept[3]["state_dict"][key], value) for key, value in kept[2]["state_dict"].items()]
    assert any(changed)
    assert list(column(run, "train/skipped_steps").values()) == [0, 1, 1, 1]
    assert kept[4]["diffratio"]["guard"] == {"skipped": 1, "in_a_row": 0}


def test_learned_ratios_survive_a_skipped_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {8})
    run = tmp_path / "run"
    result = train_tiny(data, run, "callbacks.nonfinite=skip")
    assert 0.79 <= result["macs_fraction"] <= 0.8 and result["steps"] == 8
    assert torch.isfinite(checkpoint_of(run)["state_dict"]["harm"]).all()


def test_skipping_gives_up(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(8, 999)))
    with pytest.raises(RunFailed, match="the loss is nan at step 2, 2 steps in a row"):
        train_tiny(data, tmp_path / "run", *PLAIN, "callbacks.nonfinite=skip", "callbacks.max_skipped=2")
    with pytest.raises(DiffratioError, match="unknown callbacks.nonfinite 'skp': did you mean skip"):
        train_tiny(data, tmp_path / "other", "callbacks.nonfinite=skp")


def test_a_state_that_is_not_finite_is_never_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Training.optimizer_step

    def spoiling(self: Training, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.global_step == 2:  # counted after this hook: the third step
            with torch.no_grad():
                self.groups()["weights"][0].fill_(float("inf"))

    monkeypatch.setattr(Training, "optimizer_step", spoiling)
    with pytest.raises(RunFailed, match=r"holds numbers that are not finite.*last good checkpoint is"):
        train_tiny(data, tmp_path / "run", *PLAIN)
    assert checkpoint_of(tmp_path / "run")["global_step"] == 2


def scaled(monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Lets `train` work in fp16 on the CPU, with a loss scale whose gradients overflow in the first step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    original = trainer.Trainer

    def in_halves(**settings: Any) -> Any:
        del settings["precision"]
        settings["plugins"].append(MixedPrecision("16-mixed", "cpu", scaler))
        return original(**settings)

    monkeypatch.setattr(trainer, "Trainer", in_halves)
    return scaler


def test_a_loss_scale_that_overflows_is_no_fault(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler leaves the step out and lowers its scale; the guard neither stops nor counts that."""
    scaler, run = scaled(monkeypatch), tmp_path / "run"
    result = train_tiny(data, run, *PLAIN)
    assert result["steps"] == 4 and scaler.get_scale() == 2.0**8
    saved = checkpoint_of(run)
    assert saved["diffratio"]["guard"] == {"skipped": 0, "in_a_row": 0}
    moments = saved["optimizer_states"][0]["state"][0]
    assert moments["step"] == 3 and torch.isfinite(moments["exp_avg"]).all()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_in_fp16_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch)
    poison(monkeypatch, {19})
    with pytest.raises(RunFailed, match=r"the loss is nan at step 2 \(samples 19 of the stream"):
        train_tiny(data, tmp_path / "run", *PLAIN)


def with_module(monkeypatch: pytest.MonkeyPatch, change: Callable[[Training], None]) -> None:
    """Lets `train` start with a changed module."""
    original = build.build_module

    def changed(*args: Any) -> Training:
        module = original(*args)
        change(module)
        return module

    monkeypatch.setattr(build, "build_module", changed)


def test_a_router_that_scores_all_tokens_alike_is_reported_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def collapse(module: Training) -> None:
        torch.nn.init.zeros_(module.method.routers[1].weight)  # type: ignore[attr-defined]

    train_tiny(data, tmp_path / "well", *PLAIN)
    assert "warning" not in capsys.readouterr().err
    assert min(column(tmp_path / "well", "routing/logit_std").values()) > 0.01
    with_module(monkeypatch, collapse)
    train_tiny(data, tmp_path / "ill", *PLAIN, "optimizer.router_lr=0")
    said = capsys.readouterr().err
    assert said.count("diffratio: warning: the routers of layers 1 score all tokens alike at step 1") == 1
    assert said.count("warning") == 1
    assert max(column(tmp_path / "ill", "routing/logit_std").values()) < 1e-6


def test_ratios_that_stand_still_are_reported_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["budget.target=1.0", "trainer.max_steps=16", "trainer.val_check_interval=100"]
    train_tiny(data, tmp_path / "ill", *run, "optimizer.ratio_lr=0")
    said = capsys.readouterr().err
    assert said.count("diffratio: warning: no keep ratio has moved in 5 steps") == said.count("warning") == 1
    train_tiny(data, tmp_path / "well", "trainer.max_steps=16", "trainer.val_check_interval=100")
    assert "warning" not in capsys.readouterr().err
    assert column(tmp_path / "well", "ratios/moved")[6] > 0.01
