"""The comparison as a whole, on tiny checkpoints and real pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import diffratio
from diffratio import surgery
from diffratio.backbones import get_backbone
from diffratio.checkpoint import export
from diffratio.data.images import ImageData
from diffratio.errors import DiffratioError
from diffratio.evaluation.block import block_table
from diffratio.evaluation.compare import compare_from_config
from diffratio.evaluation.records import read_records
from diffratio.sampling.schedulers import make_scheduler

DATA = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10)
CARD: dict[str, Any] = {
    "name": "tiny",
    "backbone": "dit",
    "objective": "flow",
    "sampler": {"name": "flow_euler", "steps": 20, "guidance_scale": 2.0},
    "data": "none",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dense and a routed checkpoint of one tiny model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    transformer = get_backbone("dit").tiny(sample_size=32, patch_size=4)
    scheduler = make_scheduler("flow_euler")
    export(transformer, folder / "dense", card=CARD, scheduler=scheduler)
    surgery.apply_(transformer, diffratio.for_budget("mod", transformer, 0.8, steps=5))
    export(transformer, folder / "routed", card=CARD | {"kind": "routed"}, scheduler=scheduler)
    return str(folder / "dense"), str(folder / "routed")


def settings(checkpoints: tuple[str, str], out: Path, **changes: Any) -> Mapping[str, Any]:
    return {
        "name": "compare",
        "weights": checkpoints[0],
        "methods": ["fewer_steps", "tome"],
        "routed": [checkpoints[1]],
        "finetuned": None,
        "budgets": [0.8],
        "seeds": [0, 1],
        "n": 6,
        "steps": 5,
        "guidance_scale": 2.0,
        "batch_size": 4,
        "reference_n": 20,
        "validation_n": 6,
        "latency_batches": [2],
        "latency_repeats": 2,
        "block_repeats": 0,
        "device": "cpu",
        "paths": {"output_dir": str(out)},
    } | changes


@pytest.fixture(scope="module")
def outcome(checkpoints: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compare")
    return out, compare_from_config(settings(checkpoints, out), DATA.held_out)


def test_every_arm_and_seed_leaves_a_record(outcome: tuple[Path, dict[str, Any]]) -> None:
    out, answer = outcome
    records = {(record.arm.name, record.budget, record.seed): record for record in read_records(out)}
    assert {(name, seed) for name, _, seed in records} == {
        (name, seed) for name in ("dense", "mod", "fewer_steps", "tome") for seed in (0, 1)
    }
    assert len(answer["arms"]) == 8
    for (name, budget, _), record in records.items():
        assert record.status == "ok" and record.n == 6
        assert (out / record.images["samples"]).is_file()
        fraction = record.cost["fraction"]
        assert fraction == 1.0 if name == "dense" else budget - 0.01 <= fraction <= budget
        assert record.cost["latency"][0]["batch"] == 2 and record.cost["latency"][0]["median_ms"] > 0
    assert Path(answer["report"]).stat().st_size > 50_000


def test_figures_mean_what_they_say(outcome: tuple[Path, dict[str, Any]]) -> None:
    records = {(record.arm.name, record.seed): record for record in read_records(outcome[0])}
    dense, routed = records["dense", 0], records["mod", 0]
    assert "kid_lite0_vs_dense" not in dense.quality and "excess_loss" not in dense.quality
    assert routed.schedule is not None and dense.schedule is None
    assert len(routed.quality["excess_loss_regions"]) == 4
    mean = sum(region["value"] for region in routed.quality["excess_loss_regions"]) / 4
    assert routed.quality["excess_loss"]["value"] == pytest.approx(mean, abs=1e-6)
    difference = routed.quality["kid_lite0"]["value"] - dense.quality["kid_lite0"]["value"]
    assert routed.quality["kid_lite0_vs_dense"]["value"] == pytest.approx(difference, rel=1e-6, abs=1e-6)
    assert "excess_loss" not in records["fewer_steps", 0].quality
    assert records["fewer_steps", 0].run is not None and records["fewer_steps", 0].run.steps == 4
    assert records["tome", 0].quality != records["tome", 1].quality


def test_an_unreachable_budget_is_a_record_not_an_end(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    changes = {"budgets": [0.2], "routed": [], "methods": ["tome"], "seeds": [0], "latency_repeats": 0}
    answer = compare_from_config(settings(checkpoints, tmp_path, validation_n=0, **changes), DATA.held_out)
    (record,) = [record for record in read_records(tmp_path) if record.arm.name == "tome"]
    assert record.status == "unreachable" and "cannot reach a budget of 0.2" in record.message
    assert answer["arms"][1]["status"] == "unreachable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["mod"]}, "is learned, so it needs trained weights"),
        ({"methods": ["tomee"]}, "did you mean tome"),
        ({"budgets": [1.5]}, "outside"),
        ({"budgets": []}, "at least one budget"),
        ({"n": 2}, "kid_lite0"),
        ({"n": "many"}, "it takes an integer"),
        ({"methods": "tome"}, "it takes a list"),
    ],
)
def test_bad_settings(checkpoints: tuple[str, str], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        compare_from_config(settings(checkpoints, tmp_path / "out", **changes), DATA.held_out)
    assert not (tmp_path / "out").exists()


def test_dense_and_routed_are_not_confused(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    dense, routed = checkpoints
    with pytest.raises(DiffratioError, match="is a routed checkpoint"):
        compare_from_config(settings((routed, routed), tmp_path / "a"), DATA.held_out)
    with pytest.raises(DiffratioError, match="is a dense checkpoint"):
        compare_from_config(settings((dense, dense), tmp_path / "b"), DATA.held_out)


def test_the_block_table_is_measured() -> None:
    table = block_table(width=144, side=8, bins=(5,), repeats=2)
    (row,) = table["rows"]
    assert row["routed_ms"] > 0 and row["dense_ms"] > 0 and 0.3 < row["MACs"] < 0.6
    assert row["overhead"] == pytest.approx(row["routed_ms"] / row["dense_on_k_ms"], rel=0.2)


def test_the_report_says_that_few_tokens_save_little_time(outcome: tuple[Path, dict[str, Any]]) -> None:
    for name in ("report.html", "report.md"):
        assert "At 64 image tokens little time can be saved" in (outcome[0] / name).read_text(encoding="utf-8")
