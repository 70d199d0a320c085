"""A training job of seconds: three layers of 16 tokens, a few hundred pictures of the embedded Fashion-MNIST."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffratio.data.registry import embedded_folder
from diffratio.data.subset import balanced_subset
from diffratio.training.run import compose, train

MODEL = [
    "backbone=dit_fashion",
    "backbone.config.num_attention_heads=2",
    "backbone.config.attention_head_dim=16",
    "backbone.config.num_layers=3",
    "backbone.config.patch_size=8",
]
TINY = [
    *MODEL,
    "data.batch_size=8",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",  # on every processor: `auto` takes bf16 where it is native
    "trainer.devices=1",
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "optimizer.ema=0.9",
    "optimizer.ratio_lr=0.05",
    "callbacks.ratios_every=1",
    "callbacks.pictures_n=2",
    "callbacks.probe_n=8",
    "callbacks.final_n=8",
]


def fashion_subset(folder: Path) -> Path:
    """200 training and 60 held-out pictures, in two parquet files of a folder."""
    source = embedded_folder("fashion_mnist")
    balanced_subset(source / "train.parquet", folder / "train.parquet", per_class=20)
    balanced_subset(source / "test.parquet", folder / "test.parquet", per_class=6)
    return folder


def job(data: Path, run: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny job."""
    return [*TINY, f"data.source={data}", f"paths.output_dir={run}", *overrides]


def train_tiny(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    """Trains in this process."""
    torch.set_num_threads(1)
    return train(compose("train", job(data, run, *overrides)))


def checkpoint_of(run: Path) -> dict[str, Any]:
    """What Lightning saved last."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert isinstance(saved, dict)
    return saved


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV table."""
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def column(run: Path, name: str) -> dict[int, float]:
    """One metric by step."""
    return {int(row["step"]): float(row[name]) for row in rows_of(run / "logs" / "metrics.csv") if row.get(name)}


def check_mixed(words: Callable[[str], list[str]], folder: Path) -> None:
    """A job in bf16, also where the processor has none of it: it draws its pictures and has the losses of fp32.

    Args:
        words: overrides of the job, by the name of its run.
        folder: that its runs lie in.
    """
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        short = ["trainer.max_steps=2", "trainer.val_check_interval=2", f"trainer.precision={precision}"]
        train(compose("train", [*words(precision), *short]))
        losses.append([*column(folder / precision, "train/diffusion_loss").values()])
        assert list((folder / precision / "pictures").glob("samples-*.png"))
    assert len(losses[0]) == 2
    for full, mixed in zip(*losses, strict=True):
        assert mixed != full and abs(mixed - full) < 0.02 * full
