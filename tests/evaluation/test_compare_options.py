"""What a comparison can be asked for beside its arms: a plan, losses alone, archives, loggers, compiled times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import CARD, DATA, light, make_checkpoints, settings, timeless
from cost_tables import latency_table

import diffratio
from diffratio import cli, surgery
from diffratio.backbones import backbone_of
from diffratio.checkpoint import export, load_transformer
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import CompareSettings, arms, compare_from_config, plan_text
from diffratio.evaluation.records import Record, read_records
from diffratio.objectives import get_objective
from diffratio.sampling.schedulers import make_scheduler
from diffratio.sensitivity import MeasureSettings, measure_sensitivity, save_sensitivity, solved


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    light(monkeypatch, tmp_path)


def test_all_arms_compute_in_the_type_of_the_base(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the CPU a checkpoint is loaded in the type that it was stored in: a run's own export is wider than a base."""
    opened = arms.load_pipeline

    def stored(source: str, dtype: Any = None, *rest: Any, **options: Any) -> Any:
        return opened(source, dtype or ("bfloat16" if source == checkpoints["dense"] else "float32"), *rest, **options)

    monkeypatch.setattr(arms, "load_pipeline", stored)
    config = settings(checkpoints, tmp_path, routed=[checkpoints["routed"]], finetuned=checkpoints["tuned"])
    found = arms.line_up(CompareSettings.from_config(config), "cpu")
    assert {one.arm.name for one in found.contenders} >= {"dense", "dense_finetuned", "mod", "tome"}
    assert {one.pipe.transformer.dtype for one in found.contenders} == {torch.bfloat16}


def compare(checkpoints: dict[str, str], out: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Record]]:
    answer = compare_from_config(settings(checkpoints, out, **changes), DATA.held_out)
    return answer, {record.arm.name: record for record in read_records(out)}


def test_a_dry_run_tells_and_writes_nothing(checkpoints: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = settings(checkpoints, out, dry_run=True, budgets=[0.8, 0.2], seeds=[0, 1], routed=[checkpoints["routed"]])
    plan = compare_from_config(config, DATA.held_out)["plan"]
    assert not out.exists()
    rows = {(row["arm"], row["budget"]): row for row in plan["arms"]}
    assert set(rows) == {("dense", 1.0), ("mod", 0.8), ("tome", 0.8), ("tome", 0.2)}
    assert rows["tome", 0.2]["status"] == "unreachable" and "cannot reach" in rows["tome", 0.2]["reason"]
    assert rows["tome", 0.2]["samples"] == rows["tome", 0.2]["seconds"] == 0
    assert 0.79 <= rows["tome", 0.8]["macs_fraction"] <= 0.8
    assert plan["samples"] == 3 * 2 * 4 and plan["seconds"] > 0
    assert all(word in plan_text(plan) for word in ("unreachable", "24 samples", "mod"))


def test_a_schedule_for_milliseconds_stands_at_its_macs(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """A comparison's budgets are MACs: 0.7 of the milliseconds on some machine is not one."""
    transformer: Any = load_transformer(checkpoints["tuned"])
    times = latency_table((0.0, *(9.0 + bin_ / 10 for bin_ in range(10))), width=16, side=8)
    surgery.apply_(transformer, diffratio.for_budget("mod", transformer, 0.95, steps=5, table=times))
    folder = tmp_path / "timed"
    export(transformer, folder, card=CARD | {"kind": "routed"}, scheduler=make_scheduler("flow_euler"))
    config = settings(checkpoints, tmp_path / "out", dry_run=True, routed=[str(folder)], methods=[])
    (row,) = (one for one in compare_from_config(config, DATA.held_out)["plan"]["arms"] if one["arm"] == "mod")
    assert row["macs_fraction"] < 0.6 and row["budget"] - 0.01 <= row["macs_fraction"] <= row["budget"]


def test_the_verb_takes_dry_run(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [f"weights={checkpoints['dense']}", "debug=cpu_compare", f"paths.output_dir={out}", "methods=[tome]"]
    assert cli.main(["compare", "--dry-run", *words]) == 0
    assert capsys.readouterr().out.startswith("arm ")
    assert cli.main(["compare", *words, "dry_run=true", "--json"]) == 0
    assert [row["arm"] for row in json.loads(capsys.readouterr().out)["plan"]["arms"]] == ["dense", "tome"]
    assert not out.exists()


def test_training_free_methods_run_on_both_dense_models(checkpoints: dict[str, str], tmp_path: Path) -> None:
    changes = {"finetuned": checkpoints["tuned"], "routed": [checkpoints["routed"]]}
    _, records = compare(checkpoints, tmp_path, **changes)
    paired = {name: record.paired_with for name, record in records.items()}
    assert paired == {
        "dense": None,
        "dense_finetuned": "dense",
        "mod": "dense_finetuned",
        "tome": "dense",
        "tome@finetuned": "dense_finetuned",
    }
    assert (tmp_path / "records" / "tome-finetuned-80-s0.json").is_file()
    tuned = records["tome@finetuned"]
    assert tuned.arm.weights == checkpoints["tuned"] and tuned.arm.finetuned_steps == 7
    assert tuned.arm.weights_sha256 == records["dense_finetuned"].arm.weights_sha256
    for name in ("tome@finetuned", "mod"):
        difference = (
            records[name].quality["kid_lite0"]["value"] - records["dense_finetuned"].quality["kid_lite0"]["value"]
        )
        assert records[name].quality["kid_lite0_vs_dense"]["value"] == pytest.approx(difference, rel=1e-5, abs=1e-5)
    assert records["tome"].quality["excess_loss"] != tuned.quality["excess_loss"]


def test_methods_of_a_map_run_untrained_on_both_dense_models(checkpoints: dict[str, str], tmp_path: Path) -> None:
    transformer = load_transformer(checkpoints["dense"])
    run = backbone_of(transformer).default_run(transformer, 5, "cfg")
    chosen = MeasureSettings(n=4, lowest=0.6, samples=2)
    found = measure_sensitivity(transformer, *DATA.held_out(4), get_objective("flow"), run, chosen)
    save_sensitivity(tmp_path / "map.safetensors", found)
    changes = {"methods": ["measured", "block_drop"], "finetuned": checkpoints["tuned"], "n": 0}
    with pytest.raises(DiffratioError, match="is no map's file and no checkpoint that ships with one"):
        compare(checkpoints, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    changes["map"] = str(tmp_path / "map.safetensors")
    description = surgery.describe(transformer)
    surgery.apply_(transformer, solved("measured", found, transformer, 0.8))
    card = CARD | {"kind": "routed", "training": {"steps": 7}}
    export(transformer, tmp_path / "tuned", card=card, scheduler=make_scheduler("flow_euler"))
    surgery.remove_(transformer)
    changes["routed"] = [str(tmp_path / "tuned")]
    _, records = compare(checkpoints, tmp_path / "out", **changes)
    finetuned = records["measured_finetuned"]  # the untrained arm keeps the plain name
    assert finetuned.arm.finetuned_steps == 7 and finetuned.schedule == records["measured"].schedule
    assert finetuned.paired_with == "dense_finetuned"
    for mark in ("", "@finetuned"):
        record = records[f"measured{mark}"]
        schedule = found.schedule(description, 0.8, router=False)
        assert record.schedule == {"bins": [list(row) for row in schedule.bins]}
        assert record.arm.method["ranking"] == "strided" and record.quality["excess_loss"]["value"] != 0
        assert 0.79 <= record.cost["fraction"] <= 0.8
    assert records["block_drop"].status in ("ok", "unreachable")
    assert records["measured"].quality["excess_loss"] != records["measured@finetuned"].quality["excess_loss"]
    with pytest.raises(DiffratioError, match="measured for a run of 5 steps"):
        compare(checkpoints, tmp_path / "other", **{**changes, "steps": 6})


def test_no_samples_gives_losses_costs_and_times_alone(checkpoints: dict[str, str], tmp_path: Path) -> None:
    _, records = compare(
        checkpoints, tmp_path / "fast", n=0, latency_repeats=1, methods=["tome", "fewer_steps"], save_npz=True
    )
    tome = records["tome"]
    assert tome.n == 0 and set(tome.quality) == {"excess_loss", "excess_loss_regions"} and not tome.images
    assert records["fewer_steps"].quality == {} and records["dense"].quality == {}
    assert tome.cost["latency"][0]["median_ms"] > 0
    assert not (tmp_path / "fast" / "images").exists()
    assert {path.name.split("-")[0] for path in (tmp_path / "fast" / "cache").iterdir()} == {"losses"}
    _, sampled = compare(checkpoints, tmp_path / "sampled")
    assert sampled["tome"].quality["excess_loss"] == pytest.approx(tome.quality["excess_loss"])


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_costs_sampler_and_archive(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, really: bool
) -> None:
    original = surgery.compile_
    compiled: list[Any] = []

    def traced(transformer: Any, **options: Any) -> Any:
        compiled.append(transformer)  # tracing alone takes half a minute on a busy core
        return original(transformer, backend="eager", **options) if really else transformer

    monkeypatch.setattr(surgery, "compile_", traced)
    _, records = compare(
        checkpoints,
        tmp_path,
        latency_repeats=2,
        latency_modes=["eager", "compiled"],
        latency_batches=[1, 2],
        save_npz=True,
    )
    assert len(compiled) == 2
    for record in records.values():
        assert [(row["mode"], row["batch"]) for row in record.cost["latency"]] == [
            ("eager", 1), ("eager", 2), ("compiled", 1), ("compiled", 2),
        ]  # fmt: skip
        assert all(row["median_ms"] > 0 and row["repeats"] == 2 for row in record.cost["latency"])
        memory = record.cost["peak_memory_mib"]
        assert memory is None or memory >= 0
        assert record.sampler == "flow_euler" and record.sampler_settings == {}
        assert record.provenance["device"] != "auto"
        with np.load(tmp_path / "npz" / f"{record.id}.npz") as archive:
            assert archive["arr_0"].shape == (4, 32, 32, 1) and archive["arr_0"].dtype == np.uint8
            assert archive["arr_1"].tolist() == [0, 1, 2, 3]


def test_a_logger_gets_figures_and_grids(checkpoints: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compare(checkpoints, tmp_path, logger={"name": "tensorboard"})
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    (kid,) = events.Scalars("tome-80/kid_lite0")
    assert kid.value == pytest.approx(timeless(tmp_path)["tome-80-s0"]["quality"]["kid_lite0"]["value"], rel=1e-5)
    assert set(events.Tags()["images"]) == {"samples/dense-100-s0", "samples/tome-80-s0"}


def test_wandb_offline(checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    compare(
        checkpoints, tmp_path / "out", n=0, logger={"name": "wandb", "project": "p", "entity": None, "offline": True}
    )
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/files/media/table/*.json")
    table = json.loads(file.read_text())
    assert [row[0] for row in table["data"]] == ["dense", "tome"] and "excess_loss" in table["columns"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_modes": ["fast"]}, "unknown latency mode 'fast'"),
        ({"seeds": [0, 0]}, "stands there twice"),
        ({"train": True, "train_methods": ["mod", "mod"]}, "stands there twice"),
        ({"seeds": [-1]}, "seeds: each must be at least 0, got -1"),
        ({"latency_batches": [0]}, "latency_batches: each must be at least 1, got 0"),
        ({"train": True, "train_steps": 0}, "train_steps of at least 1"),
        ({"logger": {"name": "csv"}}, "known are tensorboard, wandb"),
        ({"methods": ["mod"]}, "train=true"),
        ({"methods": ["measured"], "map": "nowhere.safetensors"}, "'nowhere.safetensors' is no map's file"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"n": -1}, "kid_lite0"),
    ],
)
def test_bad_settings_are_one_line(
    checkpoints: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DiffratioError) as caught:
        compare(checkpoints, tmp_path / "out", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
