"""LoRA jobs: what they change, what their files hold, that they resume, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from resuming import assert_same_end
from test_resume import Cut, cut_at
from tiny_run import checkpoint_of, column, job, train_tiny
from torch import Tensor

import diffratio
from diffratio import checkpoint
from diffratio.backbones import get_backbone
from diffratio.checkpoint import load_transformer, read_card
from diffratio.cli import main
from diffratio.errors import DiffratioError
from diffratio.surgery import adapter_layers, is_applied
from diffratio.training import build
from diffratio.training.export import export_module_adapter
from diffratio.training.run import check, compose, export_run
from diffratio.training.step import TrainingStep

pytest.importorskip("peft")
LORA = ["lora=default", "lora.rank=2", "optimizer.lr=5e-3"]
SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=2"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of the tiny model."""
    plain = _plain(Path("nowhere"), Path("nowhere"))
    torch.manual_seed(3)
    transformer = get_backbone("dit").from_config(plain["backbone"]["config"])
    return checkpoint.export(transformer, tmp_path_factory.mktemp("base") / "base")


def _plain(data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(compose("train", job(data, run, *overrides)), resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def on(base: Path) -> list[str]:
    return [*LORA, f"backbone.source={base}"]


@pytest.fixture(scope="session")
def whole(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with everything: learned ratios, distillation, gradient checkpointing, moving average."""
    run = tmp_path_factory.mktemp("lora") / "run"
    train_tiny(data, run, *on(base), "objective.distill=1.0", "backbone.gradient_checkpointing=true")
    return run


def test_only_updates_routers_and_ratios_change(data: Path, whole: Path, base: Path) -> None:
    begun = build.build_module(_plain(data, whole, *on(base)), None)
    start, end = begun.state_dict(), checkpoint_of(whole)["state_dict"]
    updates = {key for key in start if ".lora_" in key}
    routing = {key for key in start if ".router." in key}
    assert len(updates) == 3 * 6 * 2 and len(routing) == 3 * 2
    assert set(end) == updates | routing | {"keep_ratios.rho", "harm"}  # the base is not in it
    changed = {key for key, value in end.items() if not torch.equal(value, start[key])}
    assert changed >= updates | {key for key in routing if key.endswith("weight")} | {"keep_ratios.rho"}
    frozen = {name for name, one in begun.transformer.named_parameters() if not one.requires_grad}
    plain = load_transformer(base).state_dict()
    for name in frozen:
        key = name.replace(".base_layer", "")
        assert torch.equal(begun.transformer.state_dict()[name], plain[key]), name
    groups = [len(group["params"]) for group in checkpoint_of(whole)["optimizer_states"][0]["param_groups"]]
    assert groups == [len(updates), len(routing), 1]
    assert len(checkpoint_of(whole)["callbacks"]["WeightAverage"]["shadow_params"]) == len(updates | routing)


def test_the_merged_export_and_the_adapter_are_one_model(whole: Path, base: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result["adapter"] == str(whole / "adapter") and 0.79 <= result["macs_fraction"] <= 0.8
    merged, adapter = load_transformer(whole / "export"), load_transformer(whole / "adapter")
    assert not adapter_layers(merged) and not adapter_layers(adapter) and is_applied(adapter)
    first, second = merged.state_dict(), adapter.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    plain = load_transformer(base).state_dict()
    changed = {key for key in plain if not torch.equal(plain[key], first[key])}
    assert len(changed) == 3 * 6 and all(".attn1." in key or ".ff." in key for key in changed)
    assert diffratio.macs(adapter).fraction == result["macs_fraction"]
    sizes = {
        name: sum(path.stat().st_size for path in (whole / name).rglob("*.safetensors"))
        for name in ("adapter", "export")
    }
    assert sizes["adapter"] < sizes["export"] / 5
    for name in ("adapter", "export"):
        card = read_card(whole / name)
        assert card.kind == "routed" and card.training["lora"]["rank"] == 2 and card.training["base"] == str(base)


def test_distillation_learns_from_the_base_and_shares_its_memory(data: Path, whole: Path, base: Path) -> None:
    distances = column(whole, "train/distill_loss")
    assert distances[0] == 0 and all(distances[step] > 0 for step in range(1, 8))
    module = build.build_module(_plain(data, whole, *on(base), "objective.distill=1.0"), None)
    (teacher,) = module._teacher
    assert not adapter_layers(teacher) and not is_applied(teacher)
    plain = load_transformer(base).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in teacher.state_dict().items())
    for _ in range(2):
        held = {parameter.data_ptr() for parameter in module.transformer.parameters()}
        assert all(parameter.data_ptr() in held for parameter in teacher.parameters())
        module.to(torch.float64)  # as a move to another device: the same parameters, with other storage


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_export_writes_what_train_wrote(whole: Path, tmp_path: Path, adapter: bool) -> None:
    words = ["export", str(whole), "--out", str(tmp_path / "out"), *(["--adapter"] if adapter else [])]
    assert main(words) == 0
    own = whole / ("adapter" if adapter else "export")
    assert (tmp_path / "out" / "diffratio_adapter.json").is_file() == adapter
    first, second = (load_transformer(folder).state_dict() for folder in (own, tmp_path / "out"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "cut",
    [pytest.param(3, id="before the freeze"), pytest.param(7, id="after the freeze", marks=pytest.mark.slow)],
)
def test_resumed_equals_uncut(
    data: Path, base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    words = [*on(base), "objective.distill=1.0", "backbone.gradient_checkpointing=true"]
    words += [f"callbacks.checkpoint_every={cut - 1}"]
    with monkeypatch.context() as patch:
        cut_at(cut, patch)
        with pytest.raises(Cut):
            train_tiny(data, tmp_path / "run", *words)
    assert checkpoint_of(tmp_path / "run")["global_step"] == cut - 1
    train_tiny(data, tmp_path / "run", *words, "ckpt_path=last")
    assert_same_end(tmp_path / "run", whole)


def check_short_run(result: dict[str, Any], run: Path, routed: bool) -> None:
    adapter = load_transformer(run / "adapter")
    assert is_applied(adapter) == routed
    assert read_card(run / "adapter").kind == ("routed" if routed else "dense")
    assert diffratio.macs(adapter).fraction == result["macs_fraction"]
    first, second = load_transformer(run / "export").state_dict(), adapter.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["dense", pytest.param("hand", marks=pytest.mark.slow)])
def test_fixed_methods_train(data: Path, base: Path, tmp_path: Path, method: str) -> None:
    result = train_tiny(data, tmp_path / "run", *on(base), f"method={method}", *SHORT)
    check_short_run(result, tmp_path / "run", method != "dense")


def test_random_weights_have_no_adapter_folder(data: Path, tmp_path: Path) -> None:
    result = train_tiny(data, tmp_path / "run", *LORA, "method=mod", *SHORT)
    assert "adapter" not in result and not (tmp_path / "run" / "adapter").exists()
    assert any(".base_layer." in key for key in checkpoint_of(tmp_path / "run")["state_dict"])
    export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    with pytest.raises(DiffratioError, match=r"--adapter: the base of this run had random weights"):
        export_run(str(tmp_path / "run"), str(tmp_path / "x"), adapter=True)


def test_a_full_run_has_no_adapter(data: Path, tmp_path: Path) -> None:
    module = build.build_module(_plain(data, tmp_path, "method=mod"), None)
    assert module.base is None
    with pytest.raises(DiffratioError, match="--adapter: this run trained all weights.*lora=default"):
        export_module_adapter(module, tmp_path / "x", {})
    assert not (tmp_path / "x").exists()


def test_a_changed_base_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    result = train_tiny(data, tmp_path / "run", *on(own), "method=mod", *SHORT)
    check_short_run(result, tmp_path / "run", routed=True)
    transformer = load_transformer(base)
    with torch.no_grad():
        next(transformer.parameters()).mul_(2)
    checkpoint.export(transformer, own)
    words = [*on(own), "method=mod", "trainer.max_steps=3", "ckpt_path=last"]
    with pytest.raises(DiffratioError, match=r"this LoRA run was begun on '.*' with weights \w{12}, and '.*' now has"):
        train_tiny(data, tmp_path / "run", *words)
    with pytest.raises(DiffratioError, match="resume with the settings that it was trained with, lora and backbone"):
        train_tiny(data, tmp_path / "run", "method=mod", "trainer.max_steps=3", "ckpt_path=last")
    with pytest.raises(DiffratioError, match="this LoRA run was begun on"):
        export_run(str(tmp_path / "run"), str(tmp_path / "x"))


def test_a_rank_is_enough_and_check_counts_what_is_trained(data: Path) -> None:
    full = check(compose("train", job(data, Path("x"))))
    lora = check(compose("train", job(data, Path("x"), "lora.rank=2")))
    assert "lora_parameters" not in full and lora["parameters"] == full["parameters"]
    assert lora["lora_parameters"] == 3 * 2 * (4 * (32 + 32) + 2 * (32 + 128))
    assert lora["memory_mib"]["state"] <= full["memory_mib"]["state"]
    module = build.build_module(_plain(data, Path("x"), "lora.rank=2"), None)
    trained = sum(one.numel() for name, one in module.transformer.named_parameters() if ".lora_" in name)
    assert trained == lora["lora_parameters"]


def test_a_step_by_hand(data: Path) -> None:
    plain = _plain(data, Path("x"), *LORA, "method=mod")
    source = build.build_data(plain)
    step = TrainingStep(build.build_module(plain, source), "cpu")
    before: dict[str, Tensor] = {key: one.clone() for key, one in step.module.state_dict().items()}
    assert step(next(iter(source.train_dataloader()))) > 0
    after = step.module.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".lora_" in key or ".router." in key for key in changed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.rank=0"], "lora.rank 0 must be an integer of at least 1; lora=none trains without LoRA"),
        (["lora=default", "lora.rank=2.5"], "lora.rank=2.5: it takes an integer"),
        (["lora=default", "lora.rank=10000000"], "lora.rank 10000000 is more than the 128 features"),
        (["lora=default", "lora.targets=mlp"], "known are attention, block, feed_forward, self_attention"),
        (["lora=default", "optimizer.weights=none"], "optimizer.weights=none trains routing alone and lora.rank asks"),
        (["lora=big"], "unknown lora 'big': known are default, none"),
        (["lora=default", "+lora.bias=all"], "unknown key of lora 'bias'"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *job(data, tmp_path / "run", *words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "run").exists()
