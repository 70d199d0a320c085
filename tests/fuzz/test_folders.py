"""Checkpoint folders, damaged in any file: they are sampled, or refused in one line, and nothing else happens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import NASTY, answered, damaged, fuzzed, mutated
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import diffratio
from diffratio import checkpoint
from diffratio.backbones import get_backbone
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.files import sha256
from diffratio.routing.schedule import KeepSchedule
from diffratio.tokens.grid import TokenGrid

CARD = {"name": "tiny", "sampler": {"name": "flow_euler", "steps": 2, "guidance_scale": 2.0}}


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense checkpoint, a routed one and an adapter on the dense one."""
    place = tmp_path_factory.mktemp("folders")
    schedule = KeepSchedule(((10, 10), (5, 3), (2, 7)), uniform_run(2, TokenGrid(4, 4)), 0.8)
    found = {"dense": checkpoint.export(get_backbone("dit").tiny(), place / "dense", card=CARD)}
    routed = diffratio.apply_(get_backbone("dit").tiny(), diffratio.DiffCR(schedule=schedule))
    found["routed"] = checkpoint.export(routed, place / "routed", card=CARD)
    transformer = diffratio.add_lora_(diffratio.load_transformer(found["dense"]), diffratio.LoraSettings(rank=2))
    found["adapter"] = checkpoint.export_adapter(transformer, place / "adapter", found["dense"], card=CARD)
    return found


def sampled(folder: Path, capsys: pytest.CaptureFixture[str], codes: tuple[int, ...] = (0, 2)) -> int:
    """One picture in two steps, through the command line."""
    out = folder.parent / "out"
    words = ["sample", str(folder), "--n", "1", "--steps", "2", "--device", "cpu", "--out", str(out / "x.png")]
    code = answered(capsys, [*words, "--json"], codes)
    if code:
        assert not list(out.glob("*"))
    return code


def resealed(folder: Path) -> None:
    """Puts the digests right, as somebody would who means harm."""
    routing, adapter = folder / "routing.json", folder / "diffratio_adapter.json"
    if routing.is_file():
        document = json.loads(routing.read_text())
        document["weights"]["sha256"] = sha256(next((folder / "transformer").glob("*.safetensors")))
        routing.write_text(json.dumps(document))
    if adapter.is_file():
        document = json.loads(adapter.read_text())
        document["files"] = {name: sha256(folder / name) for name in document["files"]}
        adapter.write_text(json.dumps(document))


def _swapped(path: Path, data: st.DataObject) -> None:
    """Changes tensors of a file: exchanged, of another type, of another shape, not finite, left out, one too many."""
    state = load_file(path)
    keys = sorted(state)
    one, other = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(keys))
    how = data.draw(st.sampled_from(["exchange", "type", "shape", "nan", "out", "more", "scalar", "empty"]))
    if how == "exchange":
        state[one], state[other] = state[other].clone(), state[one].clone()
    elif how == "type":
        kinds = [
            torch.int64,
            torch.bool,
            torch.float64,
            torch.float16,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.uint8,
        ]
        state[one] = state[one].to(data.draw(st.sampled_from(kinds)))
    elif how == "shape":
        state[one] = state[one].flatten()[None].contiguous()
    elif how == "nan":
        state[one] = torch.full_like(state[one], data.draw(st.sampled_from([float("nan"), float("inf")])))
    elif how == "out":
        del state[one]
    elif how == "more":
        state[f"{one}.more"] = state[one].clone()
    else:
        state[one] = torch.tensor(1.0) if how == "scalar" else torch.zeros(0)
    save_file(state, path, metadata={"format": "pt"})


@fuzzed(40, 500, st.data())
def _folders(
    tmp_path_factory: pytest.TempPathFactory,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    kind = data.draw(st.sampled_from(sorted(folders)))
    folder = tmp_path_factory.mktemp("damaged") / kind
    shutil.copytree(folders[kind], folder)
    if kind == "adapter":
        shutil.copytree(folders["dense"], folder.parent / "dense")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    path = data.draw(st.sampled_from(files))
    how = data.draw(
        st.sampled_from(["content", "content", "content", "bytes", "delete", "rename", "exchange", "folder"])
    )
    if how == "content" and path.suffix == ".json":
        text = data.draw(mutated(json.loads(path.read_text())))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif how == "content":
        _swapped(path, data)
        resealed(folder)
    elif how == "bytes":
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        if path.suffix == ".safetensors":
            resealed(folder)
    elif how == "delete":
        path.unlink()
    elif how == "rename":
        path.rename(path.with_name(f"other{path.suffix}"))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(data.draw(st.sampled_from(files)).read_bytes())
    before = sorted(str(one) for one in folder.rglob("*"))
    sampled(folder, capsys)
    assert sorted(str(one) for one in folder.rglob("*")) == before


test_folders, test_many_folders = _folders


@pytest.mark.parametrize("kind", ["dense", "routed", "adapter"])
def test_the_unharmed_folder_is_sampled(
    kind: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in {kind, "dense"}:
        shutil.copytree(folders[name], tmp_path / name)
    assert sampled(tmp_path / kind, capsys) == 0


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
)
def test_a_pickle_in_a_transformer_folder_is_not_run(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, mark = tmp_path / "dense", tmp_path / "ran"
    shutil.copytree(folders["dense"], folder)
    next((folder / "transformer").glob("*.safetensors")).unlink()
    torch.save({"a": Bomb(mark)}, folder / "transformer" / name)
    assert sampled(folder, capsys) == 2
    (folder / "transformer" / name).write_bytes(pickle.dumps(Bomb(mark)))  # the format of before 1.6
    assert sampled(folder, capsys) == 2
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it would have


@pytest.mark.parametrize("place", ["scheduler/scheduler_config.json", "card.json", "model_index.json"])
def test_a_pickle_in_place_of_json_is_not_run(
    place: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, mark = tmp_path / "dense", tmp_path / "ran"
    shutil.copytree(folders["dense"], folder)
    (folder / place).write_bytes(pickle.dumps(Bomb(mark)))
    sampled(folder, capsys)
    assert not mark.exists()


def test_a_pickle_as_checkpoint_or_run_is_not_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, mark, run = tmp_path / "bomb.ckpt", tmp_path / "ran", tmp_path / "run"
    torch.save({"state_dict": Bomb(mark), "callbacks": {}, "global_step": 1}, file)
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(file, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("name: x\n")
    for words in (
        ["sample", str(file), "--out", str(tmp_path / "x.png")],
        ["export", str(file), "--out", str(tmp_path / "out")],
        ["export", str(run), "--out", str(tmp_path / "out")],
        ["train", f"ckpt_path={file}", f"paths.output_dir={tmp_path / 'new'}"],
        ["train", "ckpt_path=last", f"paths.output_dir={run}"],
        ["check", "fashion_diffcr", f"backbone.source={file}"],
    ):
        answered(capsys, words, (2,))
    assert not mark.exists() and not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [1, 1]\nb: [*a, *a]\n", "it has aliases"),
        ("a: " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read"),
        ("- 1\n", "holds no settings"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_hostile_config_of_a_run(text: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert main_line(capsys, ["export", str(tmp_path), "--out", str(tmp_path / "out")]).count(says) == 1


def main_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    from diffratio.cli import main

    assert main(words) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (["os", "system"], "unknown library 'os'"),
        (["evil", "Model"], "unknown library 'evil'"),
        (["transformers", "AutoModel"], "stands for any class"),
        (["diffusers", "models.unets"], "not [library, class]"),
        (["../evil", "Model"], "not [library, class]"),
    ],
)
def test_an_index_names_no_module_from_elsewhere(part: list[str], says: str, tmp_path: Path) -> None:
    from diffratio.conditions.index import read_index

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline", "text_encoder": part}))
    with pytest.raises(DiffratioError) as caught:
        read_index(tmp_path / "model_index.json")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def _text_folder(folder: Path, code: str) -> None:
    """A PixArt checkpoint whose index gives its text encoder to a module inside the folder."""
    checkpoint.export(get_backbone("pixart").tiny(), folder, card={"name": "t"})
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["evil", "Model"], "tokenizer": ["evil", "Model"], "vae": ["evil", "Model"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("text_encoder", "tokenizer", "vae"):
        (folder / part).mkdir()
        (folder / part / "evil.py").write_text(code)
        (folder / part / "config.json").write_text("{}")


def test_code_in_a_pipeline_folder_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    _text_folder(tmp_path / "text", f"open({str(mark)!r}, 'w').close()\nclass Model: pass\n")
    with pytest.raises(DiffratioError, match="unknown library 'evil'"):
        diffratio.load_pipeline(tmp_path / "text")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", 7, "..", "model.bin"])
def test_shards_lie_beside_their_index(name: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(folders["dense"], folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    index = weights.with_name(f"{weights.name}.index.json")
    state = load_file(weights)
    whole = {"metadata": {}, "weight_map": {key: "one.safetensors" for key in state}}
    weights.rename(weights.with_name("one.safetensors"))
    index.write_text(json.dumps(whole))
    diffratio.load_transformer(folder)
    whole["weight_map"]["proj_out_2.bias"] = name
    index.write_text(json.dumps(whole))
    with pytest.raises(DiffratioError, match="must be the name of a .safetensors file"):
        diffratio.load_transformer(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 10**9}, "an integer of 1 to the 2"),
        ({"target_modules": "(a+)+$"}, "a list of names of layers"),
        ({"rank_pattern": {"(a+)+$": 1}}, "names of layers with numbers"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "as every LoRA"),
        ({"peft_type": "PREFIX_TUNING"}, "is no LoRA configuration"),
        ({"modules_to_save": ["x"]}, "as every LoRA"),
    ],
)
def test_lora_settings_that_cost_or_import(
    changes: dict[str, Any], says: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("adapter", "dense"):
        shutil.copytree(folders[name], tmp_path / name)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    resealed(tmp_path / "adapter")
    with pytest.raises(DiffratioError, match=says):
        diffratio.load_transformer(tmp_path / "adapter")


@pytest.mark.parametrize(
    "header",
    [
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F77", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**50]}},
        {"a": 1},
        [],
    ],
)
def test_headers_that_lie(header: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(folders["dense"], folder)
    raw = json.dumps(header).encode()
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))
    with pytest.raises(DiffratioError, match="damaged or cut short"):
        diffratio.load_transformer(folder)


@pytest.mark.parametrize(
    "steps", [value for value in NASTY if value != 1000 and not (type(value) is int and 0 < value < 99)]
)
def test_a_scheduler_makes_no_table_of_any_length(steps: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    from diffratio.checkpoint.bounds import check_scheduler

    with pytest.raises(DiffratioError, match="num_train_timesteps"):
        check_scheduler({"num_train_timesteps": steps}, tmp_path)
