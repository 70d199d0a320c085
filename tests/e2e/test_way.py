"""The whole way through the command line, each verb in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from tiny_run import checkpoint_of, fashion_subset, job

import diffratio
from diffratio.checkpoint import load_pipeline
from diffratio.sampling.generate import generate
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.schedulers import make_scheduler
from diffratio.training.callbacks import WeightAverage
from diffratio.training.module import Training
from diffratio.training.run import compose, train

PACKAGE = Path(diffratio.__file__).parent.parent


def environment(folder: Path) -> dict[str, str]:
    """One thread, and caches inside the test's folder."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(PACKAGE)}


def run(folder: Path, *words: str) -> Any:
    """Runs a verb in a fresh process and reads its JSON."""
    command = [sys.executable, "-m", "diffratio", *words, "--json"]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pictures(path: Path) -> np.ndarray:
    return np.load(path)["arr_0"]


def test_train_export_sample(tmp_path: Path) -> None:
    data, folder, out = fashion_subset(tmp_path / "data"), tmp_path / "run", tmp_path / "routed"
    result = run(tmp_path, "train", *job(data, folder, "debug=cpu", "trainer.max_steps=6", "optimizer.lr=1e-3"))
    assert result["steps"] == 6 and 0.79 <= result["macs_fraction"] <= 0.8
    exported = run(tmp_path, "export", str(folder), "--out", str(out))
    assert exported["macs_fraction"] == result["macs_fraction"]
    options = ["--n", "6", "--steps", "6", "--device", "cpu", "--seed", "3"]
    for name in ("first", "second"):
        run(tmp_path, "sample", str(out), *options, "--out", f"{name}.png", "--npz", f"{name}.npz")
    first, second = (pictures(tmp_path / f"{name}.npz") for name in ("first", "second"))
    assert first.shape == (6, 32, 32, 1) and (first == second).all()
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()

    here = generate(load_pipeline(out), 6, seed=3, steps=6, guidance_scale=2.0, quiet=True)
    pixels = ((here.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (pixels == first).all()
    saved = checkpoint_of(folder)["diffratio"]["schedule"]
    assert [list(row) for row in saved["bins"]] == result["schedule"]


def test_export_samples_as_the_transformer_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained module with its average put in, before anything was written, against the loaded folder."""
    kept: list[Training] = []
    original = Training.on_save_checkpoint

    def remember(self: Training, checkpoint: dict[str, Any]) -> None:
        kept.append(self)
        original(self, checkpoint)

    monkeypatch.setattr(Training, "on_save_checkpoint", remember)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train(compose("train", job(fashion_subset(tmp_path / "data"), tmp_path / "run", "trainer.max_steps=4")))
    module = kept[-1]
    assert any(isinstance(callback, WeightAverage) for callback in module.trainer.callbacks)  # type: ignore[attr-defined]
    loaded = load_pipeline(tmp_path / "run" / "export")
    pipe = diffratio.attach_(build_pipeline(module.transformer.eval(), make_scheduler("flow_euler", "flow")))
    samples = [generate(one, 4, seed=1, steps=5, guidance_scale=2.0, quiet=True) for one in (pipe, loaded)]
    torch.testing.assert_close(samples[0], samples[1], atol=1e-6, rtol=0)
    dense = DiTTransformer2DModel.from_config(loaded.transformer.config)
    dense.load_state_dict({k: v for k, v in loaded.transformer.state_dict().items() if ".router." not in k})
    pipe = build_pipeline(dense.eval(), make_scheduler("flow_euler", "flow"))
    assert (generate(pipe, 4, seed=1, steps=5, guidance_scale=2.0, quiet=True) - samples[1]).abs().max() > 1e-4

    for refused in (
        lambda: DiffusionPipeline.from_pretrained(tmp_path / "run" / "export", local_files_only=True),
        lambda: DiTTransformer2DModel.from_pretrained(
            tmp_path / "run" / "export", subfolder="transformer", local_files_only=True
        ),
    ):
        with pytest.raises((OSError, ValueError, AttributeError, ImportError)):
            refused()


@pytest.mark.slow
def test_train_py_is_the_same_job(tmp_path: Path) -> None:
    data = fashion_subset(tmp_path / "data")
    words = ["trainer.max_steps=2"]
    command = [sys.executable, str(PACKAGE / "train.py"), *job(data, tmp_path / "script", *words)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data", "hf", "script"}  # Hydra itself leaves nothing
    run(tmp_path, "train", *job(data, tmp_path / "verb", "trainer.max_steps=2"))
    first, second = (checkpoint_of(tmp_path / name)["state_dict"] for name in ("script", "verb"))
    assert all(torch.equal(first[key], second[key]) for key in second)
    bad = [sys.executable, str(PACKAGE / "train.py"), *job(data, tmp_path / "script", *words)]
    done = subprocess.run(
        bad, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 2 and "holds a run already" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_train_one_schedule(tmp_path: Path) -> None:
    """DDP over two CPU processes: half the batch in each gives the run of one process, to rounding."""
    data = fashion_subset(tmp_path / "data")
    common = ["trainer.max_steps=4", "trainer.val_check_interval=4", "optimizer.ema=0.9"]
    two = run(
        tmp_path,
        "train",
        *job(data, tmp_path / "two", *common, "trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=4"),
    )
    one = run(tmp_path, "train", *job(data, tmp_path / "one", *common))
    assert two["schedule"] == one["schedule"] and two["steps"] == one["steps"] == 4
    first, second = (checkpoint_of(tmp_path / name)["state_dict"] for name in ("one", "two"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=2e-4, rtol=1e-3)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
