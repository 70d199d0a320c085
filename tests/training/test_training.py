"""Whole runs of a tiny model: what they reach, what they leave alone, what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import check_mixed, checkpoint_of, column, job, rows_of, train_tiny

import diffratio
from diffratio.checkpoint import load_transformer, read_card
from diffratio.errors import DiffratioError
from diffratio.training import build
from diffratio.training.logs import RunWandbLogger
from diffratio.training.run import compose, export_run, train
from diffratio.training.settings import BudgetSettings

SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=2"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the modules that `train` builds."""
    built: list[Any] = []
    original = build.build_module

    def spy(*args: Any) -> Any:
        built.append(original(*args))
        return built[-1]

    monkeypatch.setattr(build, "build_module", spy)
    return built


def test_training_ends_on_the_budget(straight: Callable[..., Path]) -> None:
    run = straight()
    result = json.loads((run / "result.json").read_text())
    assert 0.79 <= result["macs_fraction"] <= 0.80
    transformer = load_transformer(run / "export")
    assert diffratio.macs(transformer, steps=20).fraction == pytest.approx(result["macs_fraction"], abs=1e-12)
    schedule = diffratio.surgery.attachment(transformer).token_method.config.schedule
    assert [list(row) for row in schedule.bins] == result["schedule"]
    assert schedule.run.steps == 20 and schedule.budget == 0.8 and schedule.layers == 3 and schedule.regions == 4


def test_ratios_are_learned_one_by_one(straight: Callable[..., Path]) -> None:
    run = straight()
    gradients = column(run, "ratios/grad_norm")
    assert [step for step in range(8) if gradients[step] > 0] == [0, 1, 2, 3]  # frozen after step 4
    rows = rows_of(run / "ratios.csv")
    assert [(int(row["step"]), int(row["layer"])) for row in rows] == [(s, la) for s in (1, 2, 3) for la in range(3)]
    last = torch.tensor([[float(row[f"region{region}"]) for region in range(4)] for row in rows[-3:]])
    assert last.std(0).max() > 1e-3 and last.std(1).max() > 1e-3  # differ over layers, and over regions


def test_budget_falls_along_its_ramp_and_is_met(straight: Callable[..., Path]) -> None:
    budget = BudgetSettings(target=0.8, anneal=0.3, freeze=0.5)
    reached = column(straight(), "ratios/budget")
    for step in (0, 1, 2, 3):
        assert reached[step] == pytest.approx(budget.at((step + 1) / 8), abs=1e-5)
    frozen = json.loads((straight() / "result.json").read_text())["rounding"]["macs"]
    assert [reached[step] for step in (4, 5, 6, 7)] == pytest.approx([frozen] * 4)


def test_loss_before_and_after_rounding_is_recorded(straight: Callable[..., Path]) -> None:
    rounding = json.loads((straight() / "result.json").read_text())["rounding"]
    assert rounding["step"] == 4 and 0.79 <= rounding["macs"] <= 0.8
    assert 0 < rounding["loss_before"] < 10 and 0 < rounding["loss_after"] < 10
    assert rounding["loss_before"] != rounding["loss_after"]


def test_validation_and_final_losses(straight: Callable[..., Path]) -> None:
    run = straight()
    result = json.loads((run / "result.json").read_text())
    assert result["val_loss"] == pytest.approx(sum(result["val_loss_regions"]) / 4)
    assert sorted(column(run, "val/loss")) == [3, 7]
    assert (run / "pictures" / "samples-000008.png").is_file()


def test_the_card_says_what_was_trained(straight: Callable[..., Path]) -> None:
    card = read_card(straight() / "export")
    assert len(card.class_names) == 10 and card.class_names[9] == "ankle boot"
    assert card.training["steps"] == 8 and card.sampler.steps == 20 and card.kind == "routed"


def test_export_is_the_moving_average(straight: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """The export that train wrote, the one from the checkpoint, and the average itself agree; the weights differ."""
    run = straight()
    document = export_run(str(run), str(tmp_path / "again"))
    assert document["steps"] == 8
    files = [folder / "transformer" / "diffratio_model.safetensors" for folder in (run / "export", tmp_path / "again")]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    saved = checkpoint_of(run)
    names = [name for name, _ in load_transformer(run / "export").named_parameters()]
    shadow = dict(zip(_order(names), saved["callbacks"]["WeightAverage"]["shadow_params"], strict=True))
    assert all(torch.equal(first[name], shadow[name]) for name in names)
    assert any(not torch.equal(first[name], saved["state_dict"][f"transformer.{name}"]) for name in names)
    routing = [json.loads((folder / "routing.json").read_text()) for folder in (run / "export", tmp_path / "again")]
    assert routing[0] == routing[1]
    assert read_card(run / "export") == read_card(tmp_path / "again")


def _order(names: list[str]) -> list[str]:
    return [name for name in names if ".router." not in name] + [name for name in names if ".router." in name]


def test_the_average_counts_steps_not_micro_batches(straight: Callable[..., Path]) -> None:
    for accumulate in (1, 2):
        assert checkpoint_of(straight(accumulate))["callbacks"]["WeightAverage"]["optimization_step"] == 8
        rows = [(row["step"], row["layer"]) for row in rows_of(straight(accumulate) / "ratios.csv")]
        assert len(rows) == len(set(rows)) == 9
    assert checkpoint_of(straight(2))["ImageData"]["position"] == 8 * 2 * 8


@pytest.mark.parametrize("weighting", ["run", "density"])
def test_regions_weigh_in_the_ratios_as_in_the_run(data: Path, weighting: str, monkeypatch: Any) -> None:
    """Logit-normal training visits region r with mass p_r, the run 4, 5, 5, 6 times: the quotient scales."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(
        compose("train", job(data, Path("x"), f"budget.weighting={weighting}")), resolve=True
    )
    module = build.build_module(plain, None)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "log", lambda *_: None)
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    assert module.keep_ratios is not None
    module.keep_ratios.rho.grad = torch.ones_like(module.keep_ratios.rho)
    module.configure_gradient_clipping(None)  # type: ignore[arg-type]
    seen = -module.harm / 0.05
    mass = torch.distributions.Normal(0, 1).cdf(torch.logit(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))).diff()
    expected = torch.tensor([0.2, 0.25, 0.25, 0.3]) / mass if weighting == "run" else torch.ones(4)
    assert torch.allclose(seen, expected.expand_as(seen), rtol=1e-4)


@pytest.mark.parametrize("method", ["mod", "hand"])
@pytest.mark.parametrize("target", [0.8, 0.6])
def test_fixed_methods_solve_themselves_for_the_budget(data: Path, method: str, target: float) -> None:
    cfg = compose("train", job(data, Path("unused"), f"method={method}", f"budget.target={target}"))
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    module = build.build_module(plain, None)  # type: ignore[arg-type]
    assert target - 0.01 <= module.method.macs(module.run).fraction <= target
    assert not module.learning_ratios and module.groups()["ratios"] == []


@pytest.mark.parametrize("method", ["mod", "hand"])
def test_fixed_methods_train(data: Path, tmp_path: Path, method: str) -> None:
    result = train_tiny(data, tmp_path / "run", f"method={method}", *SHORT)
    assert 0.79 <= result["macs_fraction"] <= 0.8 and result["rounding"] is None
    assert not (tmp_path / "run" / "ratios.csv").exists()
    assert diffratio.macs(load_transformer(tmp_path / "run" / "export")).fraction == result["macs_fraction"]


@pytest.mark.parametrize("method", ["tome", "fewer_steps"])
def test_training_free_methods_are_refused(data: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(DiffratioError, match=f"'{method}' is training-free; train takes dense, .*diffcr"):
        train_tiny(data, tmp_path / "run", f"method={method}")
    assert not (tmp_path / "run").exists()


def test_frozen_weights_leave_only_routing_to_learn(data: Path, tmp_path: Path, modules: list[Any]) -> None:
    train_tiny(data, tmp_path / "run", "optimizer.weights=none", "objective.distill=1.0")
    saved = checkpoint_of(tmp_path / "run")
    (optimizer,) = saved["optimizer_states"]
    assert [len(group["params"]) for group in optimizer["param_groups"]] == [6, 1]  # 3 routers of 2, the ratios
    reference = build.build_module(*_arguments(data, tmp_path, "optimizer.weights=none"))
    start = {name: value for name, value in reference.state_dict().items() if name in saved["state_dict"]}
    changed = {name for name in start if not torch.equal(start[name], saved["state_dict"][name])}
    assert {name for name in changed if ".router." not in name} <= {"harm", "keep_ratios.rho"}
    assert sum(".router." in name for name in changed) >= 3
    assert "keep_ratios.rho" in changed


def _arguments(data: Path, folder: Path, *overrides: str) -> tuple[Any, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose("train", job(data, folder, *overrides)), resolve=True), None


def test_nothing_to_train_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="leaves nothing to train; set optimizer.weights=all"):
        train_tiny(data, tmp_path / "run", "method=dense", "optimizer.weights=none", *SHORT)


def test_distillation_starts_at_zero_and_leaves_the_teacher(
    data: Path, tmp_path: Path, modules: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[dict[str, torch.Tensor]] = []
    original = build.dense_copy

    def copy(transformer: torch.nn.Module, **options: Any) -> torch.nn.Module:
        teacher = original(transformer, **options)
        teachers.append({name: value.clone() for name, value in teacher.state_dict().items()})
        return teacher

    monkeypatch.setattr(build, "dense_copy", copy)
    train_tiny(data, tmp_path / "run", "objective.distill=1.0", "optimizer.lr=1e-3")
    distances = column(tmp_path / "run", "train/distill_loss")
    assert distances[0] == 0 and all(distances[step] > 0 for step in range(1, 8))
    (teacher,) = modules[0]._teacher
    assert all(torch.equal(value, teachers[0][name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any("teacher" in name for name in checkpoint_of(tmp_path / "run")["state_dict"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.timesteps=one_region"],
        ["objective.timesteps=iid", "method.estimator=loop"],
        ["objective.timesteps=iid", "method.estimator=soft"],
        ["objective.timesteps=one_region", "method.estimator=soft", "method.regions=1", "objective.distill=1.0"],
        ["method.regions=1"],
        ["method.regions=1", "objective.timesteps=one_region"],
        ["objective=noise"],
        ["objective=noise", "backbone.config.out_channels=2", "objective.distill=0.5"],
        ["budget.target=1.0"],
        ["budget.anneal=0", "budget.freeze=0"],
        ["budget.freeze=1.0", "optimizer.ema=0", "optimizer.clip=0", "optimizer.schedule=cosine", "optimizer.warmup=2"],
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_variants_train_to_the_budget(data: Path, tmp_path: Path, overrides: list[str]) -> None:
    result = train_tiny(data, tmp_path / "run", *overrides, "trainer.max_steps=4")
    target = 1.0 if "budget.target=1.0" in overrides else 0.8
    assert target - 0.01 <= result["macs_fraction"] <= target
    assert result["steps"] == 4 and math.isfinite(result["val_loss"])
    regions = 1 if "method.regions=1" in overrides else 4
    assert {len(row) for row in result["schedule"]} == {regions}
    card = read_card(tmp_path / "run" / "export")
    assert card.objective == ("noise" if "objective=noise" in overrides else "flow")
    assert column(tmp_path / "run", "train/diffusion_loss").keys() == set(range(4))
    if target < 1:
        assert result["rounding"]["step"] == {"budget.freeze=1.0": 4, "budget.anneal=0": 1}.get(overrides[0], 2)


def test_gradient_checkpointing_changes_no_loss(data: Path, tmp_path: Path, straight: Callable[..., Path]) -> None:
    train_tiny(data, tmp_path / "run", "backbone.gradient_checkpointing=true")
    for name in ("train/diffusion_loss", "train/grad_norm", "ratios/grad_norm"):
        with_it, without = column(tmp_path / "run", name), column(straight(), name)
        assert with_it == pytest.approx(without, rel=1e-5)


def test_a_data_set_smaller_than_the_probe(data: Path, tmp_path: Path) -> None:
    overrides = ["data.validation_split=null", "data.validation_fraction=0.01", "data.train_split=test"]
    result = train_tiny(data, tmp_path / "run", *overrides, "callbacks.probe_n=100", "callbacks.final_n=500", *SHORT)
    assert result["steps"] == 2 and result["rounding"]["step"] == 1


def test_a_folder_that_holds_a_run_is_refused(data: Path, straight: Callable[..., Path]) -> None:
    run = straight()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(DiffratioError, match="holds a run already; resume it with ckpt_path=last"):
        train_tiny(data, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_last_starts_where_there_is_nothing_to_resume(data: Path, tmp_path: Path) -> None:
    assert train_tiny(data, tmp_path / "run", "ckpt_path=last", *SHORT)["steps"] == 2


def test_an_unwritable_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiffratioError, match="not writable"):
        train_tiny(data, tmp_path / "file", *SHORT)
    with pytest.raises(DiffratioError, match="not writable"):
        train_tiny(data, tmp_path / "file" / "run", *SHORT)
    assert (tmp_path / "file").read_text() == "mine"


def test_loss_that_is_not_finite_stops(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="the loss is nan at step 1 .*lower optimizer.lr"):
        train_tiny(data, tmp_path / "run", "optimizer.lr=1e30", "optimizer.clip=0", "method=dense")


def test_a_budget_below_the_reachable_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="budget.target=0.01 cannot be reached.*at least 0."):
        train_tiny(data, tmp_path / "run", "budget.target=0.01")
    assert not (tmp_path / "run").exists()


def test_bad_trainer_settings_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="trainer.max_steps 0 must be"):
        train(compose("train", job(data, tmp_path / "run", "trainer.max_steps=0")))
    with pytest.raises(DiffratioError, match="trainer: .*accelerator"):
        train(compose("train", job(data, tmp_path / "run", "trainer.accelerator=abacus")))
    assert not (tmp_path / "run").exists()


def test_tensorboard(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train_tiny(data, tmp_path / "run", "logger=tensorboard", *SHORT)["steps"] == 2
    assert list(tmp_path.glob("run/logs/**/events.*"))


@pytest.mark.slow
def test_wandb_goes_on_in_its_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a start is a folder; those of a resumed job bear one id, those of another job another."""
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    words = ["logger=wandb", "logger.offline=true", *SHORT]
    assert train_tiny(data, tmp_path / "run", *words)["steps"] == 2
    train_tiny(data, tmp_path / "run", *words, "trainer.max_steps=4", "ckpt_path=last")
    train_tiny(data, tmp_path / "other", *words)
    starts = {one.resolve() for one in tmp_path.glob("**/offline-run-*") if one.is_dir()}
    ids = [path.name.split("-")[-1] for path in sorted(starts)]
    own = [(tmp_path / run / "wandb-id.txt").read_text().strip() for run in ("run", "other")]
    assert sorted(ids) == sorted([own[0], own[0], own[1]]) and own[0] != own[1]


def test_the_id_of_a_wandb_run_is_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    begun: list[dict[str, Any]] = []

    class Run:
        ended = 0

        def finish(self, exit_code: int) -> None:
            Run.ended += 1

    monkeypatch.setattr(wandb, "init", lambda **options: (begun.append(options), Run())[1])
    for folder in ("run", "run", "other"):
        logger = RunWandbLogger(tmp_path / folder, project="p")
        assert logger.experiment is logger.experiment
        logger.finalize("success")
    ids = [options["id"] for options in begun]
    assert ids[0] == ids[1] != ids[2] and Run.ended == 3 and begun[0]["resume"] == "allow"


def test_ratios_start_at_a_schedule_and_are_learned_on(data: Path, tmp_path: Path, modules: list[Any]) -> None:
    run = ["trainer.max_steps=4", "budget.anneal=0.5"]
    train_tiny(data, tmp_path / "hand", "method=hand", "trainer.max_steps=1")
    given = tmp_path / "hand" / "export" / "routing.json"
    start = json.loads((tmp_path / "hand" / "result.json").read_text())
    result = train_tiny(data, tmp_path / "on", f"method.start={given}", *run)
    assert len(start["schedule"][0]) == len(result["schedule"][0]) and 0.79 <= result["macs_fraction"] <= 0.8
    # the target falls from what the start costs, not from the dense model
    reached = column(tmp_path / "on", "ratios/budget")
    assert reached[0] == pytest.approx((start["macs_fraction"] + 0.8) / 2, abs=1e-5)
    rows = rows_of(tmp_path / "on" / "ratios.csv")
    regions = len(start["schedule"][0])
    first = [[float(row[f"region{region}"]) for region in range(regions)] for row in rows[:3]]
    assert first != [[bin_ / 10 for bin_ in row] for row in start["schedule"]]  # learned
    distance = torch.tensor(first) - torch.tensor(start["schedule"]).clamp(min=1) / 10
    assert distance.abs().max() < 0.2  # two steps at 0.05 and the projection away
    config = load_transformer(tmp_path / "on" / "export")
    method = diffratio.surgery.attachment(config).token_method
    assert method.config.start is None and method.config.schedule.regions == regions


def test_a_start_is_refused_beside_a_schedule(data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path / "mod", "method=mod", "trainer.max_steps=1")
    given = tmp_path / "mod" / "export" / "routing.json"
    with pytest.raises(DiffratioError, match="schedule fixes the keep ratios and start learns on"):
        train_tiny(data, tmp_path / "run", f"method.start={given}", f"method.schedule={given}")
    with pytest.raises(DiffratioError, match="method.start: no file 'nowhere'"):
        train_tiny(data, tmp_path / "run", "method.start=nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("estimator", ["grouped", "soft"])
def test_mixed_precision_trains_and_samples(estimator: str, data: Path, tmp_path: Path) -> None:
    own = ["method=diffcr", f"method.estimator={estimator}", "objective.distill=1"]
    check_mixed(lambda run: job(data, tmp_path / run, *own), tmp_path)
