"""Latents and text states on disk: as the encoders give them, resumed after a kill, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffratio import cli
from diffratio.conditions import Captions
from diffratio.data import open_data
from diffratio.data import precompute as module
from diffratio.data.latents import LatentData
from diffratio.data.precompute import precompute
from diffratio.errors import DiffratioError
from diffratio.files import sha256
from diffratio.training.run import compose, plain_config
from tests.captioned import captioned_parquet
from tests.text_pipelines import tiny_pipeline

TOKENS = 120  # what PixArt-alpha's pipeline pads to


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # several add up in an order of their own on some processors
    folder = tmp_path_factory.mktemp("precompute")
    tiny_pipeline("alpha").save_pretrained(folder / "pipe")
    captioned_parquet(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def _cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "cache"))


def config(here: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A precompute config: 16 px, 20 samples a file; keys with dots are those of data."""
    pipe = str(here / "pipe")
    values: dict[str, Any] = {
        "data.source": here / "data", "data.image_size": 16, "data.caption_column": "caption",
        "data.validation_split": "validation", "vae": pipe, "text": pipe, "out": out, "shard_size": 20,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return plain_config(compose("precompute", ["data=folder", *(f"{key}={value}" for key, value in values.items())]))


@pytest.fixture(scope="module")
def latents(here: Path) -> Path:
    precompute(config(here, here / "latents"))
    return here / "latents"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def pixels_of(here: Path, split: str) -> torch.Tensor:
    """All pictures of a split in [-1, 1], read without any of this code."""
    import io

    import pyarrow.parquet as parquet
    from PIL import Image

    rows = parquet.read_table(here / "data" / f"{split}.parquet")["image"].to_pylist()
    arrays = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_latents_are_the_scaled_means_of_the_vae(here: Path, latents: Path) -> None:
    vae = tiny_pipeline("alpha").vae
    data = LatentData(str(latents), batch_size=48)
    rows = data.train_rows(range(48))
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        means = vae.encode(pixels_of(here, "train")).latent_dist.mean
    wanted = means[rows] * vae.config.scaling_factor
    assert batch["images"].shape == (48, 4, 8, 8) and sorted(rows) == list(range(48))
    assert torch.allclose(batch["images"], wanted, atol=1e-5) and wanted.std() > 1e-3
    held, labels = data.held_out(8)
    pictures, same = data.held_out_pictures(8)
    with torch.no_grad():
        decoded = vae.decode(held / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(pictures, decoded, atol=1e-4) and torch.equal(labels, same)


def test_captions_are_those_of_the_pipeline(here: Path, latents: Path) -> None:
    pipe, data = tiny_pipeline("alpha"), LatentData(str(latents), label_dropout=0.5, batch_size=48)
    batch, captions = next(iter(data.train_dataloader())), data.conditions
    assert isinstance(captions, Captions) and captions.null == len(captions) == 9 + 9 + 8 + 8
    kept = batch["labels"] != captions.null
    assert 10 < int(kept.sum()) < 40
    rows = np.array(data.train_rows(batch["positions"].tolist()))
    for row, label in zip(rows[kept.numpy()], batch["labels"][kept].tolist(), strict=True):
        assert captions.texts[label] == f"{('red', 'green', 'blue')[row % 3]} {('square', 'bar', 'dot')[row // 3 % 3]}"
    labels = torch.tensor([0, 30, captions.null])
    texts = [captions.texts[0], captions.texts[30], ""]
    states, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    found = captions.arguments(labels)
    assert torch.equal(found["encoder_attention_mask"], mask)
    assert torch.allclose(found["encoder_hidden_states"], states * mask[:, :, None], atol=2e-3)  # kept as float16
    assert captions.sentences().shape == (34, 12)


def test_a_killed_job_goes_on_to_the_same_folder(here: Path, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, saved = here / "killed", module._save
    count = 0

    def dying(path: Path, tensors: Any, job: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            (path.parent / f".{path.name}.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        saved(path, tensors, job)

    monkeypatch.setattr(module, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        precompute(config(here, out))
    with pytest.raises(DiffratioError, match="no finished folder.*goes on with it"):
        LatentData(str(out))
    monkeypatch.setattr(module, "_save", saved)
    (out / "train-00001.safetensors").write_bytes(b"torn")  # by the disk, not by us
    answer = precompute(config(here, out))
    assert (answer["kept_shards"], answer["images"]) == (1, 36) and answer["images_per_second"] > 0
    assert digests(out) == digests(latents)
    again = precompute(config(here, out))
    assert again["images"] == 0 and digests(out) == digests(latents)
    with pytest.raises(DiffratioError, match="of another set, encoder, size"):
        precompute(config(here, out, shard_size=10))


def test_a_stream_gives_the_same_files(here: Path, latents: Path) -> None:
    answer = precompute(config(here, here / "streamed", streaming="true"))
    assert answer["samples"] == {"train": 48, "validation": 8}
    names = [path.name for path in latents.glob("*.safetensors")]
    assert len(names) == 5
    for name in names:
        own, streamed = load_file(latents / name), load_file(here / "streamed" / name)
        assert set(own) == set(streamed) and all(torch.equal(own[key], streamed[key]) for key in own)


@pytest.mark.parametrize(
    ("bad", "message"), [(None, "has no caption"), ("  ", "has no caption"), ("x" * 70_000, "70,000")]
)
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_captions_that_are_none_end_a_stream_too(
    here: Path, tmp_path: Path, bad: str | None, message: str, streaming: str
) -> None:
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(here / "data" / "train.parquet"), split="train")
    captions = [*table["caption"]]
    captions[7] = bad
    (tmp_path / "bad").mkdir()
    table.remove_columns("caption").add_column("caption", captions).to_parquet(tmp_path / "bad" / "train.parquet")
    changes = {"data__source": tmp_path / "bad", "streaming": streaming}
    with pytest.raises(DiffratioError, match=f"row 7 .*{message}") as caught:
        precompute(config(here, tmp_path / "out", **changes))
    assert len(str(caught.value)) < 400 and not (tmp_path / "out" / "manifest.json").exists()


def test_classes_instead_of_captions(here: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(here / "data" / "train.parquet"), split="train")
    table = table.add_column("label", [row % 3 for row in range(len(table))])
    (tmp_path / "classes").mkdir()
    table.to_parquet(tmp_path / "classes" / "train.parquet")
    changes = {"text": "null", "data__source": tmp_path / "classes", "data__num_classes": 3}
    precompute(config(here, tmp_path / "out", **changes))
    data = LatentData(str(tmp_path / "out"), batch_size=4, validation_fraction=0.25)
    images, labels = data.held_out(9)
    assert data.held_out_size == 12 and labels.bincount().tolist() == [3, 3, 3] and images.shape[1:] == (4, 8, 8)
    assert data.conditions.null == 3 and data.class_names == ["0", "1", "2"]


def test_the_verb_prints_its_speed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=folder", f"data.source={here / 'data'}", "data.image_size=16", f"vae={here / 'pipe'}"]
    words += ["data.num_classes=null", f"out={here / 'verb'}", "device=cpu", "debug=cpu"]
    assert cli.main(["precompute", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == {"train": 48} and found["latent"] == [4, 8, 8] and found["images_per_second"] > 0
    assert cli.main(["precompute", *words]) == 0
    assert "finished before" in capsys.readouterr().out
    assert cli.main(["precompute", "data=emoji64", f"vae={here / 'nowhere'}", f"out={here / 'x'}"]) == 2
    assert "vae" in capsys.readouterr().err


def test_a_stream_without_rows_is_one_line(here: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    (tmp_path / "none").mkdir()
    table = parquet.read_table(here / "data" / "train.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "none" / "train.parquet")
    with pytest.raises(DiffratioError, match="split 'train' of .* cannot be streamed .*remove an empty one"):
        precompute(config(here, tmp_path / "out", data__source=tmp_path / "none", streaming="true"))


def test_a_refused_stream_leaves_the_folder_to_the_next_job(here: Path, latents: Path) -> None:
    from datasets import load_dataset

    changes = {"data__source": here / "blank", "streaming": "true"}
    (here / "blank").mkdir()
    table = load_dataset("parquet", data_files=str(here / "data" / "train.parquet"), split="train")
    captions = [" ", *list(table["caption"])[1:]]
    table.remove_columns("caption").add_column("caption", captions).to_parquet(here / "blank" / "train.parquet")
    with pytest.raises(DiffratioError, match="row 0 .*has no caption"):
        precompute(config(here, here / "again", **changes))
    assert [one.name for one in (here / "again").iterdir()] == ["job.json"]
    precompute(config(here, here / "again", streaming="true"))
    assert sorted(one.name for one in (here / "again").iterdir()) == sorted(one.name for one in latents.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__image_size": 15}, "no multiple of 2.*set data.image_size"),
        ({"dtype": "bfloat16"}, "known are float16, float32"),
        ({"text": "minilm", "data__caption_column": "words"}, "tokens"),
        ({"data__caption_column": "words"}, "no column 'words'.*caption_column"),
        ({"data__caption_column": "words", "streaming": "true"}, "no column 'words'.*caption_column"),
        ({"data__image_column": "photo", "streaming": "true"}, "no column 'photo'.*image_column"),
        ({"text": "null", "data__num_classes": 3, "streaming": "true"}, "no column 'label'.*label_column"),
        ({"data__train_split": "all"}, "no split 'all'"),
        ({"shard_size": 0}, "shard_size must be "),
        ({"tokens": 0}, "tokens must be at least 2, got 0"),
        ({"text": "''"}, "text='': give a name"),
        ({"data__text": 0}, "data.text is 0; it takes"),
        ({"data__source": "null"}, "data.source=None: it takes text"),
        ({"data__pad_to": 3.7}, "data.pad_to=3.7: it takes true or false"),
        ({"data__train_split": 3}, "data.train_split=3: it takes text"),
    ],
)
def test_bad_jobs_are_one_line(here: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        precompute(config(here, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_damaged_folders_are_refused(latents: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(latents, tmp_path / "copy"))
    shard = copy / "train-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DiffratioError, match=r"train-00001.*bytes, and the manifest says"):
        LatentData(str(copy))
    shard.write_bytes(whole[:-1] + b"\x01")
    LatentData(str(copy))
    with pytest.raises(DiffratioError, match="sha256"):
        LatentData(str(copy), verify=True)
    shard.unlink()
    with pytest.raises(DiffratioError, match="missing"):
        LatentData(str(copy))
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(document | {"version": 9}))
    with pytest.raises(DiffratioError, match="version 1"):
        LatentData(str(copy))
    with pytest.raises(DiffratioError, match="unknown data.kind 'latent'"):
        open_data({"kind": "latent", "source": str(latents)})
    with pytest.raises(DiffratioError, match="flip"):
        open_data({"kind": "precomputed", "source": str(latents), "flip": True})


def test_another_vae_does_not_decode(here: Path, latents: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline("alpha")
    torch.nn.init.normal_(pipe.vae.decoder.conv_in.weight)
    pipe.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(DiffratioError, match="were made by vae"):
        LatentData(str(latents), vae=str(tmp_path / "vae")).coder()
