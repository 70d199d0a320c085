"""Every kind of source, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from omegaconf import OmegaConf
from PIL import Image as Pictures

from diffratio.data import ImageData, balanced_subset, embedded_folder, embedded_sets
from diffratio.data.decode import decode
from diffratio.data.latents import LatentData
from diffratio.data.split import interleaved
from diffratio.errors import DiffratioError

Write = Callable[..., Path]
Draw = Callable[..., bytes]
CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def build(source: str | Path, **changes: Any) -> ImageData:
    arguments: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 4, "batch_size": 6}
    return ImageData(str(source), **(arguments | changes))


def message(build_and_use: Callable[[], object]) -> str:
    with pytest.raises(DiffratioError) as caught:
        build_and_use()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_embedded_set_is_balanced_padded_and_small() -> None:
    assert "fashion_mnist" in embedded_sets()
    files = list(embedded_folder("fashion_mnist").glob("*.parquet"))
    assert sum(file.stat().st_size for file in files) <= 13_000_000
    data = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10)
    images, labels = data.held_out(5000)
    assert images.shape == (5000, 1, 32, 32) and labels.bincount().tolist() == [500] * 10
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (images[:, 0, border] == -1).all() and images.max() == 1 and -0.7 < images.mean() < -0.3
    assert data.held_out(25)[1].bincount().tolist() == [3] * 5 + [2] * 5
    train, train_labels = data.reference(200)
    assert train_labels.bincount().tolist() == [20] * 10 and not torch.equal(train[:20], images[:20])
    assert data.class_names[:2] == ["t-shirt/top", "trouser"] and data.name == "fashion_mnist"
    assert len(data.train_dataloader().dataset.split) == 20_000  # type: ignore[attr-defined]
    assert "out of" not in message(lambda: data.held_out(5001)) and "1 to 5000" in message(lambda: data.held_out(5001))


def test_listing_sets_imports_nothing_heavy() -> None:
    code = "import sys, diffratio.data.registry as r; r.embedded_sets(); " \
           "sys.exit(any(m in sys.modules for m in ('datasets', 'lightning', 'pyarrow', 'torch')))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_folder_of_pictures_holds_out_a_part(picture_folder: Path) -> None:
    data = build(picture_folder, channels=3, num_classes=2, validation_fraction=0.25, label_dropout=0.0, flip=False)
    assert data.class_names == ["cat", "dog"]
    validation, labels = data.held_out(4)
    training, train_labels = data.reference(12)
    assert validation.shape == (4, 3, 8, 8)
    colours = ((torch.cat([validation, training])[:, 0, 0, 4] + 1) * 127.5).round().long()
    assert sorted(colours.tolist()) == [*range(8), *range(100, 108)]  # no picture on both sides, none lost
    assert torch.equal(torch.cat([labels, train_labels]), (colours >= 100).long())
    other = build(picture_folder, channels=3, num_classes=2, validation_fraction=0.25, seed=1).held_out(4)[0]
    assert not torch.equal(other, validation)


def test_a_link_to_a_folder_of_pictures(picture_folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(picture_folder)
    found, own = (build(one, channels=3, num_classes=2).held_out(1)[0] for one in (link, picture_folder))
    assert torch.equal(found, own)


def test_folder_with_splits(picture_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "split" / split / name).mkdir(parents=True)
    for n, file in enumerate(sorted(picture_folder.rglob("*.png"))):
        split = "test" if n % 4 == 0 else "train"
        file.rename(tmp_path / "split" / split / file.parent.name / file.name)
    data = build(tmp_path / "split", channels=3, num_classes=2)
    assert data.held_out(4)[1].tolist() == [0, 1, 0, 1]
    assert "1 to 4" in message(lambda: data.held_out(5))


def test_parquet_file_and_columns_of_other_names_and_types(parquet: Write, png: Draw, tmp_path: Path) -> None:
    parquet()
    rows: dict[str, list[Any]] = {"photo": [png(i) for i in range(12)], "kind": ["pear", "apple", None, "fig"] * 3}
    Dataset.from_dict(rows).to_parquet(tmp_path / "fruit.parquet")
    options = {"image_column": "photo", "label_column": "kind", "validation_split": None, "num_classes": 4}
    assert "row 2 of split 'train' has no known class" in message(build(tmp_path / "fruit.parquet", **options).setup)
    rows = {key: [v for i, v in enumerate(column) if i % 4 != 2] for key, column in rows.items()}
    Dataset.from_dict(rows).to_parquet(tmp_path / "fruit.parquet")
    data = build(tmp_path / "fruit.parquet", **options)
    assert data.class_names == ["apple", "fig", "pear"]
    images, labels = data.reference(8)
    values = ((images[:, 0, 0, 4] + 1) * 127.5).round().long().tolist()
    assert labels.tolist() == [{0: 2, 1: 0, 3: 1}[value % 4] for value in values]
    assert build(tmp_path / "set" / "train.parquet").class_names == [f"class {c}" for c in range(4)]


def test_large_sets_are_decoded_as_they_are_read(parquet: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet()
    held = next(iter(build(folder).train_dataloader()))
    monkeypatch.setattr("diffratio.data.images._HELD_IMAGES", 10)
    data = build(folder)
    read = next(iter(data.train_dataloader()))
    assert data.train_dataloader().dataset.split._held is None  # type: ignore[attr-defined]
    assert torch.equal(read["images"], held["images"]) and torch.equal(read["labels"], held["labels"])


def test_decoding() -> None:
    def of(picture: Pictures.Image, size: int = 8, channels: int = 1, pad: bool = True) -> np.ndarray[Any, Any]:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return decode({"bytes": buffer.getvalue(), "path": None}, size=size, channels=channels, pad=pad)

    small = Pictures.new("L", (4, 6), 200)
    padded = of(small)[0]
    assert (padded[1:7, 2:6] == 200).all() and padded.sum() == 200 * 24
    assert (of(small, pad=False) == 200).all()
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 255  # the centre square is all that is kept
    assert (of(Pictures.fromarray(wide), size=10)[0][:, 2:8] == 255).all()
    assert of(Pictures.new("L", (64, 48), 9), channels=3).shape == (3, 8, 8)
    assert (of(Pictures.new("RGBA", (8, 8), (0, 0, 0, 0)), channels=3) == 255).all()
    assert (of(Pictures.fromarray(np.full((8, 8), 51200, dtype=np.uint16))) == 200).all()


def test_interleaved_is_balanced_at_every_length() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 7))
    order = interleaved(labels)
    assert sorted(order.tolist()) == list(range(35))
    for n in range(1, 36):
        counts = np.bincount(labels[order[:n]], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert all(np.diff(order[labels[order] == c]).min() > 0 for c in range(5))


def test_balanced_subset(parquet: Write, tmp_path: Path) -> None:
    whole = parquet(n=40) / "train.parquet"
    assert balanced_subset(whole, tmp_path / "a.parquet", per_class=3, seed=1) == 12
    balanced_subset(whole, tmp_path / "b.parquet", per_class=3, seed=1)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    part = Dataset.from_parquet(str(tmp_path / "a.parquet"))
    assert part["label"][:] == [0, 1, 2, 3] * 3 and isinstance(part.features["label"], ClassLabel)
    assert "1 to 10" in message(lambda: balanced_subset(whole, tmp_path / "c.parquet", per_class=11))
    assert "no parquet file" in message(lambda: balanced_subset(tmp_path / "none", tmp_path / "c", per_class=1))
    wrong = message(lambda: balanced_subset(whole, tmp_path / "c", per_class=1, label_column="kind"))
    assert "image, label" in wrong and not (tmp_path / "c").exists()


@pytest.mark.parametrize("source", ["fashion_mnst", "./nowhere", "a/b/c", "nowhere.parquet"])
def test_source_not_found_is_said_at_once(source: str) -> None:
    said = message(build(source).setup)
    assert source in said and "fashion_mnist" in said and "owner/name" in said


def test_hub_out_of_reach_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    said = message(build("someone/pictures").setup)
    assert "connect to the network" in said and "give the path of its folder" in said


def test_folders_and_files_that_hold_no_images(tmp_path: Path) -> None:
    assert "no parquet and no image files" in message(build(tmp_path).setup)
    (tmp_path / "notes.txt").write_text("none")
    assert "not a .parquet file" in message(build(tmp_path / "notes.txt").setup)
    (tmp_path / "bad.parquet").write_text("none")
    assert "cannot be read" in message(build(tmp_path / "bad.parquet").setup)


def test_column_missing_names_the_columns_present(parquet: Write) -> None:
    folder = parquet()
    said = message(build(folder, image_column="picture").setup)
    assert "'picture'" in said and "image, label" in said and "image_column" in said
    assert "image, label" in message(build(folder, label_column="kind").setup)
    assert "not images" in message(build(folder, image_column="label").setup)


def test_class_conditional_model_without_a_label_column(parquet: Write) -> None:
    folder = parquet()
    assert "label_column is null" in message(build(folder, label_column=None).setup)
    assert build(folder, label_column=None, num_classes=None).held_out(1)[0].shape == (1, 1, 8, 8)


def test_more_classes_than_the_model_has(parquet: Write) -> None:
    folder = parquet(classes=5)
    said = message(build(folder).setup)
    assert "5 classes" in said and "num_classes=4" in said
    assert len(build(folder, num_classes=1000).class_names) == 5


@pytest.mark.parametrize("fault", ["text", "truncated", "absent"])
def test_corrupt_row_is_named(parquet: Write, png: Draw, fault: str) -> None:
    broken = {"text": b"not a picture", "truncated": png(3, 64, 64)[:50], "absent": None}[fault]
    data = build(parquet(broken={17: broken}), validation_split=None, validation_fraction=0.5)

    def use_both_splits() -> None:
        data.held_out(20)
        data.train_dataloader()

    said = message(use_both_splits)
    assert "row 17 of split 'train'" in said and "replace or remove" in said


def test_corrupt_file_is_named(picture_folder: Path) -> None:
    (picture_folder / "dog" / "3.png").write_bytes(b"no picture")
    data = build(picture_folder, channels=3, num_classes=2, validation_fraction=0.01)
    assert str(Path("dog") / "3.png") in message(lambda: (data.train_dataloader(), data.held_out(1)))


def test_splits_that_are_missing_or_empty(parquet: Write) -> None:
    parquet("validation", n=4)
    folder = parquet()
    said = message(build(folder).setup)
    assert "no split 'test'" in said and "train, validation" in said and "null" in said
    assert build(folder, validation_split="validation").held_out(4)[1].tolist() == [0, 1, 2, 3]
    assert len(build(folder, validation_split=None).val_dataloader()) == 1
    assert "no split 'training'" in message(build(folder, train_split="training").setup)


def test_empty_split(parquet: Write) -> None:
    parquet("test", n=0)
    said = message(build(parquet()).setup)
    assert "test" in said and "empty" in said


def test_empty_split_of_a_reader_that_allows_it(parquet: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dataset.from_parquet(str(parquet() / "train.parquet"))
    monkeypatch.setattr("diffratio.data.images.open_source", lambda _: {"train": whole, "test": whole.select([])})
    said = message(build("someone/pictures").setup)
    assert "split 'test'" in said and "empty" in said and "validation_split" in said


def test_too_few_images_to_hold_one_out(parquet: Write) -> None:
    assert "too few" in message(build(parquet(n=1, classes=1)).setup)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("image_size", 0), ("image_size", -8), ("channels", 4), ("num_classes", 0), ("batch_size", 0), ("num_workers", -1),
     ("seed", -1), ("label_dropout", 1.5), ("validation_fraction", 0.0)],
)  # fmt: skip
def test_arguments_out_of_range(argument: str, value: float) -> None:
    said = message(lambda: build("fashion_mnist", **{argument: value}))
    assert argument in said and str(value) in said


def test_position_below_zero() -> None:
    assert "position" in message(lambda: build("fashion_mnist").set_position(-1))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_are_the_arguments(file: Path) -> None:
    assert file.read_text().startswith("# python train.py data=" + file.stem)
    config: Any = OmegaConf.create({"data": OmegaConf.load(file)}).data
    kind: Any = LatentData if config.pop("kind", None) == "precomputed" else ImageData
    assert set(config) == set(inspect.signature(kind.__init__).parameters) - {"self", "inpaint"}
    if kind is LatentData:  # needs a folder that precompute wrote; see test_precompute
        return
    if OmegaConf.is_missing(config, "source") or "/" in config.source:  # a hub id: no network here
        config["source"] = "fashion_mnist"
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    data = ImageData(**resolved)
    assert data.held_out(3)[0].shape == (3, config.channels, config.image_size, config.image_size)


def test_seed_of_the_run_is_the_seed_of_the_data() -> None:
    config: Any = OmegaConf.create({"seed": 5, "data": OmegaConf.load(CONFIGS / "fashion_mnist.yaml")})
    assert config.data.seed == 5
