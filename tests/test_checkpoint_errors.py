"""Every way in which a checkpoint folder can be wrong is one clear line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffratio
from diffratio import checkpoint
from diffratio.backbones import get_backbone
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.files import read_json, sha256
from diffratio.routing.schedule import KeepSchedule
from diffratio.tokens.grid import TokenGrid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A routed checkpoint of three blocks."""
    schedule = KeepSchedule(((10, 10), (5, 3), (2, 7)), uniform_run(4, TokenGrid(4, 4)), 0.8)
    transformer = diffratio.apply_(get_backbone("dit").tiny(), diffratio.DiffCR(schedule=schedule))
    return checkpoint.export(transformer, tmp_path / "routed")


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A dense one."""
    return checkpoint.export(get_backbone("dit").tiny(), tmp_path / "dense")


def weights_of(folder: Path) -> Path:
    (file,) = (folder / "transformer").glob("*.safetensors")
    return file


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reseal(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Replaces the weights and the digest that goes with them."""
    save_file(state, weights_of(folder), metadata={"format": "pt"})
    routing = folder / "routing.json"
    if routing.exists():
        weights = json.loads(routing.read_text())["weights"] | {"sha256": sha256(weights_of(folder))}
        rewrite(routing, weights=weights)


def break_truncated(folder: Path) -> None:
    data = weights_of(folder).read_bytes()
    weights_of(folder).write_bytes(data[: len(data) // 2])


def break_bit(folder: Path) -> None:
    data = bytearray(weights_of(folder).read_bytes())
    data[-1] ^= 1
    weights_of(folder).write_bytes(bytes(data))


def break_keys(folder: Path) -> None:
    state = load_file(weights_of(folder))
    del state["transformer_blocks.1.ff.net.2.bias"]
    reseal(folder, state)


def break_extra(folder: Path) -> None:
    reseal(folder, load_file(weights_of(folder)) | {"surprise": torch.zeros(1)})


def break_shape(folder: Path) -> None:
    reseal(folder, load_file(weights_of(folder)) | {"proj_out_2.bias": torch.zeros(3)})


def break_routers(folder: Path) -> None:
    reseal(folder, {key: value for key, value in load_file(weights_of(folder)).items() if ".router." not in key})


def break_schedule(folder: Path) -> None:
    method = json.loads((folder / "routing.json").read_text())["method"]
    method["schedule"]["bins"].append([10, 10])
    rewrite(folder / "routing.json", method=method)


def break_no_schedule(folder: Path) -> None:
    method = json.loads((folder / "routing.json").read_text())["method"]
    rewrite(folder / "routing.json", method=method | {"schedule": None})


def break_bin(folder: Path) -> None:
    method = json.loads((folder / "routing.json").read_text())["method"]
    method["schedule"]["bins"][0][0] = 2.5
    rewrite(folder / "routing.json", method=method)


def break_escape(folder: Path) -> None:
    rewrite(folder / "routing.json", weights={"file": "../../secret.safetensors", "sha256": "0"})


BROKEN_ROUTED = {
    "missing folder": (lambda f: shutil.rmtree(f), "is missing"),
    "no routing": (lambda f: (f / "routing.json").unlink(), "without its routing.json"),
    "routing garbage": (lambda f: (f / "routing.json").write_text("{garbage"), "cannot be read as JSON"),
    "routing list": (lambda f: (f / "routing.json").write_text("[]"), "holds list, not an object"),
    "routing version": (lambda f: rewrite(f / "routing.json", version=9), "version 9"),
    "routing method": (lambda f: rewrite(f / "routing.json", method={"name": "difcr"}), "did you mean diffcr"),
    "training-free": (lambda f: rewrite(f / "routing.json", method={"name": "tome"}), "has no parameters"),
    "other backbone": (lambda f: rewrite(f / "routing.json", backbone="dot"), "unknown backbone 'dot'"),
    "other class": (lambda f: rewrite(f / "routing.json", **{"class": "FluxTransformer2DModel"}), "is not that of"),
    "no weights entry": (lambda f: rewrite(f / "routing.json", weights={}), "'file' is missing"),
    "path escape": (break_escape, "must be the name of a file"),
    "no weights": (lambda f: weights_of(f).unlink(), "are missing"),
    "truncated": (break_truncated, "damaged or cut short"),
    "one bit": (break_bit, "sha256"),
    "missing key": (break_keys, r"1 missing \(transformer_blocks.1.ff.net.2.bias\)"),
    "extra key": (break_extra, r"1 unexpected \(surprise\)"),
    "shape": (break_shape, r"proj_out_2.bias has shape \(3,\)"),
    "dense weights": (break_routers, "6 missing .*mixed up"),
    "layers": (break_schedule, "keep schedule of 4 layers does not fit a transformer of 3 blocks"),
    "no schedule": (break_no_schedule, "method.schedule is missing"),
    "bad bin": (break_bin, "is 2.5; allowed are"),
    "config garbage": (lambda f: (f / "transformer/config.json").write_text("\x00"), "cannot be read as JSON"),
    "config type": (lambda f: rewrite(f / "transformer/config.json", num_layers="many"), "does not describe a dit"),
}


@pytest.mark.parametrize("name", BROKEN_ROUTED)
def test_a_broken_routed_folder_is_one_clear_line(name: str, folder: Path) -> None:
    damage, message = BROKEN_ROUTED[name]
    diffratio.load_transformer(folder)
    damage(folder)
    with pytest.raises(DiffratioError, match=message) as caught:
        diffratio.load_transformer(folder)
    assert "\n" not in str(caught.value)
    if name != "other backbone":
        assert str(folder) in str(caught.value)


def add_routers(folder: Path) -> None:
    reseal(folder, load_file(weights_of(folder)) | {"transformer_blocks.0.router.weight": torch.zeros(16)})


BROKEN_DENSE = {
    "truncated": (break_truncated, "damaged or cut short"),
    "missing key": (break_keys, "1 missing"),
    "extra key": (break_extra, "1 unexpected"),
    "routers": (add_routers, "1 unexpected .*mixed up"),
    "foreign": (lambda f: shutil.rmtree(f / "transformer"), "is not a checkpoint"),
    "other class": (
        lambda f: rewrite(f / "transformer/config.json", _class_name="UNet2DModel"),
        "unknown transformer class 'UNet2DModel'",
    ),
    "no weights": (lambda f: weights_of(f).unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN_DENSE)
def test_a_broken_dense_folder_is_one_clear_line(name: str, dense_folder: Path) -> None:
    damage, message = BROKEN_DENSE[name]
    diffratio.load_transformer(dense_folder)
    damage(dense_folder)
    with pytest.raises(DiffratioError, match=message) as caught:
        diffratio.load_transformer(dense_folder)
    assert "\n" not in str(caught.value) and str(dense_folder) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no file"),
        (lambda f: rewrite(f / "scheduler/scheduler_config.json", _class_name="Euler"), "no scheduler of diffusers"),
        (lambda f: (f / "card.json").write_text("nonsense"), "cannot be read as JSON"),
        (lambda f: rewrite(f / "card.json", kind="sparse"), "unknown card kind"),
    ],
)
def test_a_broken_pipeline_folder(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(DiffratioError, match=message) as caught:
        diffratio.load_pipeline(folder)
    assert str(folder) in str(caught.value)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (diffratio.load_transformer, diffratio.load_pipeline):
        with pytest.raises(DiffratioError, match="checkpoint 'no-owner/no-model'") as caught:
            load("no-owner/no-model")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_layers": 5000}, "5,000 blocks"),
        ({"num_attention_heads": 10**5}, "channels of a token"),
        ({"sample_size": 10**6}, "table of positions"),
        ({"attention_head_dim": 1024}, "do not go together"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "dense_folder"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    request: pytest.FixtureRequest, kind: str, changes: dict[str, Any], says: str
) -> None:
    place: Path = request.getfixturevalue(kind)
    rewrite(place / "transformer" / "config.json", **changes)
    with pytest.raises(DiffratioError, match=says):
        diffratio.load_transformer(place)


def test_json_nested_without_end_is_one_line(folder: Path) -> None:
    (folder / "routing.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(DiffratioError, match="nested too deeply"):
        diffratio.load_transformer(folder)


def test_json_of_any_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text(json.dumps(list(range(100))))
    with pytest.raises(DiffratioError, match="large.json' has 390 bytes, and at most 100 are read"):
        read_json(tmp_path / "large.json", "list", most=100)
