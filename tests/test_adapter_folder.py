"""Adapter folders: what they hold, that they load on their own base alone, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffratio
from diffratio import checkpoint
from diffratio.backbones import get_backbone
from diffratio.checkpoint import adapter, checkpoint_kind, list_checkpoints, load_skeleton, read_card, require_kind
from diffratio.cli import main
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.routing.schedule import KeepSchedule
from diffratio.surgery import adapter_layers, add_lora_, attachment, is_applied, merged_state
from diffratio.tokens.grid import TokenGrid

peft = pytest.importorskip("peft")
BINS = ((10, 10), (5, 3), (2, 7))
NAMES = [f"class {i}" for i in range(10)]
FILE = "diffratio_adapter.json"


def dense(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return get_backbone("dit").tiny().eval()


def tuned(transformer: Any, routed: bool = True) -> Any:
    """As after a LoRA training."""
    torch.manual_seed(7)
    if routed:
        schedule = KeepSchedule(BINS, uniform_run(4, TokenGrid(4, 4)), 0.8)
        diffratio.apply_(transformer, diffratio.DiffCR(schedule=schedule))
    add_lora_(transformer, diffratio.LoraSettings(rank=2, alpha=3.0))
    for name, parameter in transformer.named_parameters():
        if ".lora_B" in name or ".router." in name:
            nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


@torch.no_grad()
def output(transformer: nn.Module) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return transformer(x, timestep=torch.tensor([100.0, 900.0]), class_labels=torch.tensor([1, 2])).sample


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint.export(dense(), tmp_path / "base", card={"class_names": NAMES})


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A routed adapter."""
    card = {"class_names": NAMES, "sampler": {"name": "flow_euler", "steps": 4, "guidance_scale": 1.5}}
    return diffratio.export_adapter(tuned(diffratio.load_transformer(base)), tmp_path / "adapter", base, card=card)


def test_round_trip(base: Path, folder: Path) -> None:
    unmerged = tuned(diffratio.load_transformer(base))
    again = diffratio.load_transformer(folder)
    assert not again.training and is_applied(again) and not adapter_layers(again)
    assert attachment(again).token_method.bins == BINS  # type: ignore[attr-defined]
    state = merged_state(unmerged)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    torch.testing.assert_close(output(again), output(unmerged), atol=1e-5, rtol=1e-5)
    kept = diffratio.load_transformer(folder, merge=False)
    assert adapter_layers(kept) and torch.equal(output(kept), output(unmerged))
    assert [one.requires_grad for one in kept.parameters()] == [one.requires_grad for one in unmerged.parameters()]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "routers.safetensors",
        FILE,
        "card.json",
        "README.md",
        "scheduler/scheduler_config.json",
    }
    assert sum(file.numel() for name in ("adapter_model", "routers") for file in _tensors(folder, name)) == sum(
        one.numel() for name, one in unmerged.named_parameters() if ".lora_" in name or ".router." in name
    )
    assert "stands on the weights of `base`" in (folder / "README.md").read_text()


def _tensors(folder: Path, name: str) -> list[Tensor]:
    return list(load_file(folder / f"{name}.safetensors").values())


def test_a_merged_export_is_a_normal_checkpoint(base: Path, folder: Path, tmp_path: Path) -> None:
    unmerged = tuned(diffratio.load_transformer(base))
    merged = checkpoint.export(unmerged, tmp_path / "merged")
    again = diffratio.load_transformer(merged)
    assert torch.equal(output(again), output(diffratio.load_transformer(folder)))
    torch.testing.assert_close(output(again), output(unmerged), atol=1e-5, rtol=1e-5)
    shutil.rmtree(base)
    assert torch.equal(output(diffratio.load_transformer(merged)), output(again))  # it needs no base


def test_types(folder: Path, base: Path, tmp_path: Path) -> None:
    half = diffratio.load_transformer(folder, torch.bfloat16)
    assert {one.dtype for name, one in half.named_parameters() if ".router." not in name} == {torch.bfloat16}
    assert {one.dtype for name, one in half.named_parameters() if ".router." in name} == {torch.float32}
    transformer = tuned(diffratio.load_transformer(base))
    small = diffratio.export_adapter(transformer, tmp_path / "small", base, dtype="float16")
    assert {one.dtype for one in _tensors(small, "adapter_model")} == {torch.float16}
    assert {one.dtype for one in _tensors(small, "routers")} == {torch.float32}
    torch.testing.assert_close(output(diffratio.load_transformer(small)), output(transformer), atol=1e-2, rtol=1e-2)


def test_a_dense_control(base: Path, tmp_path: Path) -> None:
    transformer = tuned(diffratio.load_transformer(base), routed=False)
    folder = diffratio.export_adapter(transformer, tmp_path / "dense", base)
    assert checkpoint_kind(folder) == "dense" and require_kind(folder, "dense") == folder
    again = diffratio.load_transformer(folder)
    assert not is_applied(again) and not (folder / "routers.safetensors").exists()
    torch.testing.assert_close(output(again), output(transformer), atol=1e-5, rtol=1e-5)
    assert load_skeleton(folder).state_dict().keys() == dense().state_dict().keys()
    stacked = diffratio.export_adapter(tuned(diffratio.load_transformer(folder)), tmp_path / "second", folder)
    assert diffratio.load_transformer(stacked).state_dict().keys() >= again.state_dict().keys()


def test_it_counts_as_what_it_makes_of_its_base(folder: Path) -> None:
    assert checkpoint_kind(folder) == "routed" and read_card(folder).kind == "routed"
    assert list_checkpoints(folder.parent)["adapter"].startswith("routed dit")
    with pytest.raises(DiffratioError, match="is a routed checkpoint"):
        load_skeleton(folder)


def test_it_samples(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = diffratio.load_pipeline(folder)
    assert pipe.labels == {name: label for label, name in enumerate(NAMES)} and is_applied(pipe.transformer)
    words = ["sample", str(folder), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "grid.png"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4 and (tmp_path / "grid.png").is_file()


class Adaptable(DiTTransformer2DModel, PeftAdapterMixin):
    """DiT with diffusers' adapter verbs."""


@pytest.mark.parametrize("tool", ["peft", "diffusers"])
def test_other_tools_read_the_lora_part(folder: Path, base: Path, tool: str) -> None:
    expected = diffratio.remove_(diffratio.load_transformer(folder, merge=False))
    if tool == "peft":
        loaded = peft.PeftModel.from_pretrained(dense(), folder).eval()
    else:
        loaded = Adaptable.from_config(dense().config).eval()
        loaded.load_state_dict(dense().state_dict())
        metadata = json.loads((folder / "adapter_config.json").read_text())
        state = load_file(folder / "adapter_model.safetensors")
        metadata = {f"base_model.model.{key}": value for key, value in metadata.items()}
        loaded.load_lora_adapter(state, prefix="base_model.model", metadata=metadata)
    assert torch.equal(output(loaded), output(expected))
    assert not torch.allclose(output(loaded), output(dense()), atol=1e-3)


def test_base_and_adapter_move_together(folder: Path, base: Path, tmp_path: Path) -> None:
    expected = output(diffratio.load_transformer(folder))
    (tmp_path / "elsewhere").mkdir()
    for place in (base, folder):
        place.rename(tmp_path / "elsewhere" / place.name)
    moved = tmp_path / "elsewhere" / "adapter"
    assert torch.equal(output(diffratio.load_transformer(moved)), expected)
    moved.rename(tmp_path / "alone")
    with pytest.raises(DiffratioError, match="which is not here; correct base.source in its diffratio_adapter.json"):
        diffratio.load_transformer(tmp_path / "alone")
    found = diffratio.load_transformer(tmp_path / "alone", base=tmp_path / "elsewhere" / "base")
    assert torch.equal(output(found), expected)


def test_a_shipped_base_is_named(tmp_path: Path) -> None:
    transformer = diffratio.load_transformer("fashion-dit")
    add_lora_(transformer, diffratio.LoraSettings(rank=1, targets=("self_attention",)))
    folder = diffratio.export_adapter(transformer, tmp_path / "adapter", "fashion-dit")
    document = json.loads((folder / FILE).read_text())
    assert document["base"]["source"] == "fashion-dit" and "relative" not in document["base"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 200_000
    again, plain = diffratio.load_transformer(folder), diffratio.load_transformer("fashion-dit")
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_hub_base_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--someone--tiny-dit"
    config = place / "snapshots" / commit / "transformer" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = diffratio.export_adapter(tuned(dense()), tmp_path / "adapter", "someone/tiny-dit")
    assert json.loads((folder / FILE).read_text())["base"]["revision"] == commit
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == commit
    asked: list[Any] = []

    def hub(name: str, revision: str | None = None) -> nn.Module:
        asked.append((name, revision))
        return dense()

    monkeypatch.setattr("diffratio.checkpoint.load._from_hub", hub)
    assert torch.equal(output(diffratio.load_transformer(folder)), output(_merged_of_tuned()))
    assert asked == [("someone/tiny-dit", commit)]


def _merged_of_tuned() -> nn.Module:
    return diffratio.merge_lora_(tuned(dense()))  # type: ignore[no-any-return]


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / FILE).read_text())
    change(document)
    (folder / FILE).write_text(json.dumps(document))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Another content with a digest that fits."""
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name)
    edit(folder, lambda document: document["files"].update({name: adapter.sha256(folder / name)}))


def first(state: dict[str, Tensor]) -> str:
    return sorted(state)[0]


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no lora": (lambda f: (f / "adapter_model.safetensors").unlink(), "'.*adapter_model.safetensors' is missing; copy"),
    "no routers": (lambda f: (f / "routers.safetensors").unlink(), "'.*routers.safetensors' is missing; copy"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "'.*adapter_config.json' is missing; copy"),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "is damaged or was changed: its sha256",
    ),
    "not JSON": (lambda f: (f / FILE).write_text("{"), "cannot be read as JSON"),
    "newer": (lambda f: edit(f, lambda d: d.update(version=2)), "is not 'diffratio-adapter' version 1"),
    "no method": (lambda f: edit(f, lambda d: d.pop("method")), "method is missing or out of place"),
    "no digest": (lambda f: edit(f, lambda d: d["base"].pop("sha256")), "base.sha256 is missing"),
    "a path as file": (lambda f: edit(f, lambda d: d["files"].update({"../x": "0"})), "files must name"),
    "unknown method": (lambda f: edit(f, lambda d: d["method"].update(name="diffcrr")), "did you mean diffcr"),
    "other depth": (
        lambda f: edit(f, lambda d: d["method"]["schedule"].update(bins=[[10], [5]])),
        "keep schedule of 2 layers does not fit",
    ),
    "a key too few": (
        lambda f: rewrite(f, "adapter_model.safetensors", lambda s: s.pop(first(s))),
        "do not fit: 1 missing",
    ),
    "a key too many": (
        lambda f: rewrite(f, "adapter_model.safetensors", lambda s: s.update(surprise=torch.zeros(1))),
        r"1 unexpected \(surprise\)",
    ),
    "other rank": (
        lambda f: rewrite(f, "adapter_model.safetensors", lambda s: s.update({first(s): torch.zeros(3, 3)})),
        r"has shape \(3, 3\) and the base asks for",
    ),
    "a router too few": (
        lambda f: rewrite(f, "routers.safetensors", lambda s: s.pop(first(s))),
        "routers.safetensors' do not fit: 1 missing",
    ),
    "routers without a method": (lambda f: edit(f, lambda d: d.update(method=None)), "do not fit: 6 unexpected"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_one_line(folder: Path, name: str) -> None:
    BROKEN[name][0](folder)
    with pytest.raises(DiffratioError, match=BROKEN[name][1]) as caught:
        diffratio.load_transformer(folder)
    assert "\n" not in str(caught.value)


def test_the_command_line_says_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "routers.safetensors").unlink()
    capsys.readouterr()
    assert main(["sample", str(folder), "--n", "1", "--device", "cpu", "--out", str(folder / "x.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "routers.safetensors' is missing; copy the whole folder" in line


def test_another_base_is_refused(folder: Path, base: Path, tmp_path: Path) -> None:
    other = checkpoint.export(dense(seed=1), tmp_path / "other")
    with pytest.raises(DiffratioError, match=r"stands on '.*base' with weights \w{12}, and '.*other' has \w{12}; give"):
        diffratio.load_transformer(folder, base=other)
    shutil.rmtree(base)
    checkpoint.export(dense(seed=1), base)  # changed in place
    with pytest.raises(DiffratioError, match=r"with weights \w{12}, and '.*base' has \w{12}"):
        diffratio.load_transformer(folder)
    with pytest.raises(DiffratioError, match="stands on a dense DiTTransformer2DModel and '.*' is routed"):
        routed = diffratio.apply_(dense(), diffratio.Hand())
        diffratio.load_transformer(folder, base=checkpoint.export(routed, tmp_path / "routed"))
    with pytest.raises(DiffratioError, match="base='.*' is for adapter folders"):
        diffratio.load_transformer(other, base=base)


def test_what_cannot_be_exported(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DiffratioError, match="this transformer has no LoRA; diffratio.add_lora_"):
        diffratio.export_adapter(dense(), out, base)
    several = dense()
    for name in ("one", "two"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), several, adapter_name=name)
    with pytest.raises(DiffratioError, match="has the adapters one, two"):
        diffratio.export_adapter(several, out, base)
    other = peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["to_q"]), dense())
    with pytest.raises(DiffratioError, match="holds LoRA, and this is .*LOHA; diffratio.export stores it merged"):
        diffratio.export_adapter(other, out, base)
    learning = add_lora_(diffratio.apply_(dense(), diffratio.DiffCR()))
    with pytest.raises(DiffratioError, match="keep ratios are still being learned"):
        diffratio.export_adapter(learning, out, base)
    with pytest.raises(DiffratioError, match="unknown checkpoint 'nowhere'"):
        diffratio.export_adapter(tuned(dense()), out, "nowhere")
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DiffratioError, match="not empty and not a diffratio checkpoint"):
        diffratio.export_adapter(tuned(dense()), tmp_path / "mine", base)
    checkpoint.export(other, out)  # other kinds merge
    torch.testing.assert_close(output(diffratio.load_transformer(out)), output(other), atol=1e-5, rtol=1e-5)
