"""Bad input through the command line: exit 2, one clear line, nothing half-written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from tiny_run import TINY, fashion_subset, job, train_tiny

import diffratio
from diffratio import checkpoint
from diffratio.backbones import get_backbone
from diffratio.cli import main
from diffratio.cost.run import uniform_run
from diffratio.routing.schedule import KeepSchedule
from diffratio.tokens.grid import TokenGrid


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import datasets.config

    monkeypatch.delenv("DIFFRATIO_DEBUG", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """The bars of `datasets` go to standard error too."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without faults."""
    return fashion_subset(tmp_path_factory.mktemp("fashion"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs the command line; returns the one line that it printed."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("diffratio: "), captured.err
    return lines[0]


def parquet(folder: Path, labels: bool = True, broken: int | None = None) -> Path:
    """40 grey pictures of 32x32; one of them can be damaged."""
    encoded: list[Any] = []
    for row in range(40):
        buffer = io.BytesIO()
        Pictures.fromarray(np.full((32, 32), row, dtype=np.uint8)).save(buffer, "PNG")
        picture = buffer.getvalue()
        encoded.append({"bytes": picture[: len(picture) // 2] if row == broken else picture, "path": None})
    columns: dict[str, Any] = {"image": encoded, "number": [row % 10 for row in range(40)]}
    features: dict[str, Any] = {"image": Image(), "number": Value("int64")}
    if labels:
        columns["label"] = columns["number"]
        features["label"] = ClassLabel(num_classes=10)
    folder.mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=diffcrr", "did you mean diffcr"),
        ("method=tome", "'tome' is training-free"),
        ("backbone=dti", "did you mean dit"),
        ("backbone.name=dot", "unknown backbone 'dot': did you mean dit"),
        ("backbone.config.patch_sice=4", "did you mean backbone.config.patch_size"),
        ("budget.target=0", "budget.target: budget 0.0 is outside (0, 1]"),
        ("budget.target=1.5", "budget.target: budget 1.5 is outside (0, 1]"),
        ("budget.target=half", "budget.target='half': it takes a finite number"),
        ("budget.target=0.01", "set budget.target to at least 0."),
        ("data.image_size=30", "resize or pad the data (data.image_size)"),
        ("data.image_size=64", "does not fit a model of sample_size 32; set data.image_size"),
        ("data.source=no/such/folder", "data source 'no/such/folder' not found"),
        ("data.source=''", "data.source is ''; it takes a name or a folder, data.source=NAME"),
        ("paths.output_dir=null", "paths.output_dir has no value; give it as paths.output_dir=NAME"),
        ("data.source=2024", "data.source is 2024; it takes a name or a folder, data.source=./2024"),
        ("data.label_column=colour", "has no column 'colour'"),
        ("trainer.max_steps=few", "trainer.max_steps 'few' must be an integer"),
        ("trainer.precision=17", "trainer: "),
        ("ckpt_path=nothing.ckpt", "is no file"),
        ("optimizer.lr=fast", "optimizer.lr='fast': it takes a finite number"),
    ],
)
def test_bad_settings(
    override: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Path
) -> None:
    words = [
        word
        for word in [*TINY, f"data.source={small}"]
        if word.split("=")[0] != override.split("=")[0] or override.startswith("backbone=")
    ]
    if override == "backbone=dti":
        words = [word for word in words if not word.startswith("backbone")]
    line = refused(capsys, "train", *words, f"paths.output_dir={tmp_path / 'run'}", override)
    assert message in line
    assert not (tmp_path / "run").exists() and not list((tmp_path / "work").iterdir())


def test_missing_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rest = [word for word in TINY if not word.startswith("backbone")]
    line = refused(capsys, "train", *rest, "backbone=dit", "backbone.source=fashion-did", "paths.output_dir=run")
    assert "unknown checkpoint 'fashion-did': did you mean fashion-dit" in line
    assert "nowhere" in refused(capsys, "sample", "./nowhere", "--out", "x.png")
    assert "no run folder" in refused(capsys, "export", "nowhere", "--out", "x")
    assert not list((tmp_path / "work").iterdir())


@pytest.fixture
def routed(tmp_path: Path) -> Path:
    """A routed checkpoint of a random model."""
    schedule = KeepSchedule(((10, 10), (5, 3), (2, 7)), uniform_run(3, TokenGrid(4, 4)))
    transformer = diffratio.apply_(get_backbone("dit").tiny(), diffratio.DiffCR(schedule=schedule))
    return checkpoint.export(transformer, tmp_path / "routed")


def test_routed_checkpoint_is_no_base(routed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rest = [word for word in TINY if not word.startswith("backbone")]
    words = [*rest, "backbone=dit", f"backbone.source={routed}", "data.image_size=8", "paths.output_dir=run"]
    assert "is a routed checkpoint; training starts from a dense one" in refused(capsys, "train", *words)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_truncated_weights(routed: Path, kept: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = routed / "transformer" / "diffratio_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    line = refused(capsys, "sample", str(routed), "--out", "x.png", "--device", "cpu")
    assert "damaged or cut short" in line and str(path) in line
    rest = [word for word in TINY if not word.startswith("backbone")]
    words = [*rest, "backbone=dit", f"backbone.source={routed}", "paths.output_dir=run"]
    assert "damaged or cut short" in refused(capsys, "train", *words)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"text" * 99])
def test_truncated_run(damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, run = fashion_subset(tmp_path / "data"), tmp_path / "run"
    train_tiny(data, run, "trainer.max_steps=1", "method=dense", "callbacks.pictures_n=1")
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes(damage(path.read_bytes()))
    assert "cannot be read" in refused(capsys, "export", str(run), "--out", "out")
    words = job(data, run, "trainer.max_steps=2", "method=dense", "ckpt_path=last")
    assert "cannot be read" in refused(capsys, "train", *words)
    assert not list((tmp_path / "work").iterdir())


def test_data_without_labels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = parquet(tmp_path / "data", labels=False)
    line = refused(capsys, "train", *job(data, tmp_path / "run"))
    assert "no column 'label'" in line and "number" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_corrupt_image(split: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, other = parquet(tmp_path / "data", broken=17), parquet(tmp_path / "other")
    good = "test" if split == "train" else "train"
    (data / f"{good}.parquet").write_bytes((other / f"{good}.parquet").read_bytes())
    line = refused(capsys, "train", *job(data, tmp_path / "run"))
    assert f"image in row 17 of split '{split}' cannot be decoded" in line
    assert not (tmp_path / "run").exists()


def test_damaged_parquet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = parquet(tmp_path / "data")
    (data / "train.parquet").write_bytes((data / "train.parquet").read_bytes()[:300])
    assert str(data) in refused(capsys, "train", *job(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_output_folder_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, routed: Path) -> None:
    data, file = fashion_subset(tmp_path / "data"), tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "run"):
        assert "not writable" in refused(capsys, "train", *job(data, place))
        assert "not writable" in refused(capsys, "sample", str(routed), "--out", str(place / "x.png"))
    train_tiny(data, tmp_path / "run", "trainer.max_steps=1", "method=dense", "callbacks.pictures_n=1")
    assert "is a file" in refused(capsys, "export", str(tmp_path / "run"), "--out", str(file))
    assert file.read_text() == "mine"
