"""The training stream is a function of (seed, position), however it is cut into batches, processes and runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

from diffratio.data import ImageData
from diffratio.data.stream import uniforms

Write = Callable[..., Path]


@pytest.fixture
def source(parquet: Write) -> str:
    parquet("test", n=13)
    return str(parquet("train", n=40))


def build(source: str, **changes: Any) -> ImageData:
    arguments: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 4, "batch_size": 6, "seed": 3}
    return ImageData(source, **(arguments | changes))


def take(data: ImageData, batches: int) -> dict[str, Tensor]:
    """The first batches of the training stream, joined."""
    parts = list(islice(data.train_dataloader(), batches))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() == {"images", "labels", "positions"}
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_batch_layout(source: str) -> None:
    batch = next(iter(build(source).train_dataloader()))
    assert batch["images"].shape == (6, 1, 8, 8) and batch["images"].dtype == torch.float32
    assert batch["images"].min() >= -1 and batch["images"].max() == 1
    assert batch["labels"].dtype == batch["positions"].dtype == torch.int64
    assert batch["positions"].tolist() == list(range(6))


def test_same_seed_same_stream_other_seed_other_order(source: str) -> None:
    first = take(build(source), 10)
    assert_same(first, take(build(source), 10))
    assert not torch.equal(first["images"], take(build(source, seed=4), 10)["images"])


def test_each_epoch_is_another_permutation_with_its_own_flips(source: str) -> None:
    stream = take(build(source, label_dropout=0.0, batch_size=8), 10)
    rows = (stream["images"].amin(dim=(1, 2, 3)) * 127.5 + 127.5).round().long()  # the fill colour is the row
    first, second = rows[:40], rows[40:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert first.tolist() != second.tolist()
    assert torch.equal(stream["labels"], rows % 4)
    mirrored = stream["images"][:, 0, 0, -1] == 1  # the white edge is at the right
    assert 0 < mirrored[:40].sum() < 40
    by_row = [dict(zip(part.tolist(), flags.tolist(), strict=True)) for part, flags in
              ((first, mirrored[:40]), (second, mirrored[40:]))]  # fmt: skip
    assert by_row[0] != by_row[1]


def test_no_flip_when_switched_off(source: str) -> None:
    assert (take(build(source, flip=False), 20)["images"][:, 0, :, 0] == 1).all()


@pytest.mark.parametrize("position", [6, 36, 42, 120, 4200])
def test_resume_equals_uninterrupted(source: str, position: int) -> None:
    whole = build(source)
    whole.set_position(position - 6)
    expected = {key: value[6:] for key, value in take(whole, 6).items()}
    resumed = build(source)
    resumed.load_state_dict({"position": position})
    assert resumed.state_dict() == {"position": position}
    assert_same(take(resumed, 5), expected)


def test_sample_at_a_position_does_not_depend_on_batch_size(source: str) -> None:
    assert_same(take(build(source, batch_size=6), 15), take(build(source, batch_size=45), 2))


def test_shards_of_two_processes_are_the_single_stream(source: str) -> None:
    parts: list[dict[str, Tensor]] = []
    for rank in (0, 1):
        data = build(source)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        parts.append(take(data, 10))
    assert not set(parts[0]["positions"].tolist()) & set(parts[1]["positions"].tolist())
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = joined["positions"].argsort()
    assert_same({key: value[order] for key, value in joined.items()}, take(build(source), 20))


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_workers_do_not_change_the_stream(source: str, loader: str) -> None:
    plain, parallel = (islice(getattr(build(source, num_workers=w), loader)(), 3) for w in (0, 2))
    for a, b in zip(plain, parallel, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_label_drop_rate(source: str, rate: float) -> None:
    labels = take(build(source, label_dropout=rate, batch_size=10_000), 1)["labels"]
    dropped = (labels == 4).double().mean().item()
    assert abs(dropped - rate) <= 4 * (rate * (1 - rate) / 10_000) ** 0.5
    assert ((labels >= 0) & (labels <= 4)).all()


def test_without_classes_all_labels_are_zero(source: str) -> None:
    data = build(source, num_classes=None, label_dropout=0.5)
    assert take(data, 5)["labels"].unique().tolist() == [0]
    assert data.held_out(5)[1].tolist() == [0] * 5 and data.class_names == []


def test_draws_are_uniform_and_belong_to_a_position() -> None:
    draws = uniforms(7, 0, 4000)
    assert np.array_equal(uniforms(7, 1234, 5), draws[1234:1239])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06


def test_validation_covers_everything_in_turn_and_undisturbed(source: str) -> None:
    batches = list(build(source, label_dropout=1.0).val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [6, 6, 1]
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert joined["positions"].tolist() == list(range(13))
    assert joined["labels"].tolist() == [0, 1, 2, 3] * 3 + [0]
    images, labels = build(source).held_out(13)
    assert torch.equal(images, joined["images"]) and torch.equal(labels, joined["labels"])


def test_validation_of_several_processes_is_even_and_complete(source: str) -> None:
    sizes, seen = [], []
    for rank in range(3):
        data = build(source, batch_size=3)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)  # type: ignore[assignment]
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        sizes.append([len(batch["labels"]) for batch in batches])
        seen += [p for batch in batches for p in batch["positions"].tolist()]
    assert sizes[0] == sizes[1] == sizes[2]
    assert set(seen) == set(range(13)) and len(seen) <= 13 + 2


class _Recorder(lightning.LightningModule):
    """Trains one number, and remembers which positions it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen += batch["positions"].tolist()
        return (self.weight * batch["images"].mean()).sum()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        assert batch["labels"].max() < 4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(folder: Path, steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps, limit_train_batches=4, default_root_dir=folder, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


def test_workers_are_out_of_reach_of_signals_to_the_group() -> None:
    source = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10, num_workers=1)
    batches: Any = iter(source.train_dataloader())
    next(batches)
    (worker,) = batches._workers
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)


def test_lightning_checkpoint_holds_the_position_and_epochs_go_on(source: str, tmp_path: Path) -> None:
    data, model = build(source), _Recorder()
    trainer = _trainer(tmp_path, 6)  # stops inside the second "epoch" of four batches
    trainer.fit(model, data)
    assert model.seen == list(range(36)) and data.position == 36
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    resumed, again = build(source), _Recorder()
    _trainer(tmp_path, 9).fit(again, resumed, ckpt_path=tmp_path / "state.ckpt", weights_only=True)
    assert again.seen == list(range(36, 54)) and resumed.position == 54
