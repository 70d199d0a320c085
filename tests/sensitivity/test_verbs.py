"""The way of a user: measure, check with the map, train on a schedule from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffratio.checkpoint import layout
from diffratio.cli import main
from diffratio.errors import DiffratioError
from diffratio.plain import typed
from diffratio.sensitivity import load_sensitivity, save_sensitivity, store
from diffratio.surgery import describe
from diffratio.training.build import build_method, build_transformer
from diffratio.training.run import compose, plain_config, train
from diffratio.training.settings import BudgetSettings

MODEL = [
    "backbone=dit",
    "backbone.name=dit",
    "backbone.config=null",
    "data.batch_size=8",
    "budget.steps=4",
    "debug=cpu",
    "objective.distill=0",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense pipeline for 32x32 pictures of ten classes."""
    import diffratio
    from diffratio.backbones import get_backbone

    torch.manual_seed(0)
    transformer = get_backbone("dit").tiny(sample_size=32, patch_size=8)
    return diffratio.export(transformer, tmp_path_factory.mktemp("base") / "tiny", card={"objective": "flow"})


@pytest.fixture(scope="module")
def measured(base: Path) -> Path:
    """The verb's file."""
    out = base.parent / "map.safetensors"
    argv = ["measure", "fashion_diffcr", f"backbone.source={base}", "budget.steps=4", "--out", str(out)]
    assert main([*argv, "--n", "8", "--samples", "2", "--lowest", "0.7", "--regions", "2"]) == 0
    return out


def method_of(base: Path, *overrides: str) -> Any:
    plain = plain_config(compose("train", [*MODEL, f"backbone.source={base}", *overrides]))
    return build_method(plain, build_transformer(plain), typed(BudgetSettings, plain["budget"], "budget"))


def test_measure_writes_a_map(measured: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load_sensitivity(measured)
    assert (found.n, found.run.steps, found.model.regions, found.ranking) == (8, 4, 2, "strided")
    out = base.parent / "again.safetensors"
    argv = ["measure", "fashion_diffcr", f"backbone.source={base}", "budget.steps=4", "--out", str(out), "--json"]
    assert main([*argv, "--n", "8", "--samples", "0", "--lowest", "0.8", "--regions", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(out) and document["region_weights"] == [1.0, 1.0]
    errors = [value for value in document["predicted_error"].values() if value is not None]
    assert len(errors) >= 3 and errors == sorted(errors)
    assert sorted(document["block_order"]) == [0, 1, 2]


@pytest.mark.parametrize("name", ["measured", "mod", "hand", "diffcr", "block_drop", "random_keep"])
def test_every_routed_method_starts_from_a_map(name: str, measured: Path, base: Path) -> None:
    config = method_of(base, f"method={name}", f"method.schedule={measured}", "budget.target=0.8")
    found = load_sensitivity(measured)
    assert config.schedule.run == found.run and config.schedule.budget == 0.8
    description = describe(build_transformer_of(base))
    cost = config.method(config, description).macs(found.run).fraction
    assert 0.785 <= cost <= 0.8
    if name == "block_drop":
        first = found.block_order()[0]
        assert min(config.schedule.bins[first]) == 0
    else:
        assert config.schedule == found.schedule(description, 0.8)


def build_transformer_of(base: Path) -> torch.nn.Module:
    return build_transformer(plain_config(compose("train", [*MODEL, f"backbone.source={base}"])))


def test_check_predicts_the_errors(measured: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "fashion_diffcr", f"backbone.source={base}", "budget.steps=4", "--json"]
    assert main(argv) == 0
    assert "predicted_error" not in json.loads(capsys.readouterr().out)
    assert main([*argv, "--map", str(measured)]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted_error"]
    assert predicted["this_schedule"] is None  # it is learned
    assert 0 < predicted["measured"] <= min(predicted["mod"], predicted["hand"], predicted["block_drop"])
    assert main([*argv, "method=mod", "--map", str(measured)]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_error"]["this_schedule"] == predicted["mod"]
    assert main([*argv[:3], "budget.steps=5", "--map", str(measured)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "measured for a run of 4 steps" in line and "5 steps" in line and str(measured) in line


def test_a_map_of_other_weights_is_refused(measured: Path, base: Path, tmp_path: Path) -> None:
    import dataclasses

    other = tmp_path / "other.safetensors"
    save_sensitivity(other, dataclasses.replace(load_sensitivity(measured), weights_sha256="0" * 64))
    with pytest.raises(DiffratioError, match="measured on weights 000000000000"):
        method_of(base, "method=measured", f"method.schedule={other}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=measured"], "diffratio measure EXPERIMENT"),
        (["method=measured", "method.schedule=nowhere"], "no file 'nowhere' and no checkpoint"),
        (["method=measured", "+method.ranking=best"], "diffratio measure"),
    ],
)
def test_without_a_map_the_way_is_named(overrides: list[str], message: str, base: Path) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        method_of(base, *overrides)
    assert "\n" not in str(caught.value)


def test_maps_that_ship_are_found_by_their_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "checkpoints_root", lambda: tmp_path)
    assert store.find_map("tiny") == "tiny"
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "tiny.safetensors").touch()
    assert store.find_map("tiny") == str(tmp_path / "maps" / "tiny.safetensors")
    assert store.find_map("folder/tiny") == "folder/tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of that name is meant itself, unless it is the checkpoint
    assert store.find_map("tiny") == "tiny"
    (tmp_path / "tiny" / layout.CARD).touch()
    assert store.find_map("tiny") == str(tmp_path / "maps" / "tiny.safetensors")


def test_it_trains_and_exports_from_a_map(measured: Path, base: Path, tmp_path: Path) -> None:
    import diffratio

    overrides = [f"backbone.source={base}", f"method.schedule={measured}", f"paths.output_dir={tmp_path / 'run'}"]
    result = train(compose("train", [*MODEL, "method=measured", *overrides, "trainer.max_steps=2"]))
    assert result["macs_fraction"] <= 0.8
    transformer = diffratio.load_transformer(tmp_path / "run" / "export")
    assert [list(row) for row in transformer._diffratio.token_method.bins] == result["schedule"]


def test_check_measures_what_the_map_predicts(measured: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "fashion_mod", f"backbone.source={base}", "budget.steps=4", "--json"]
    assert main([*argv, "--verify", "8"]) == 2
    assert "--map FILE" in capsys.readouterr().err
    assert main([*argv, "--map", str(measured), "--verify", "3"]) == 2
    assert "3 images are too few for 2 regions" in capsys.readouterr().err
    assert main([*argv, "--map", str(measured), "--verify", "16"]) == 0
    verified = json.loads(capsys.readouterr().out)["predicted_error"]["verified"]
    assert verified["images"] == 16 and verified["rank_correlation"]["tables"] == 60
    assert verified["rank_correlation"]["spearman"] > 0.8 and len(verified["rank_correlation"]["by_region"]) == 2
    rows = verified["schedules"]
    assert rows["this_schedule"] == rows["mod"] and set(rows) >= {"measured", "hand", "block_drop"}
    for row in (rows["measured"], rows["mod"]):
        assert 0.785 <= row["macs_fraction"] <= 0.8 and row["stderr"] > 0
        # the map was measured on other images, so the two agree in size only
        assert row["true_error"] == pytest.approx(row["predicted_error"], rel=0.5)


def test_verifying_equals_a_forward_by_hand(measured: Path, base: Path) -> None:
    import diffratio
    from diffratio.objectives import get_objective
    from diffratio.objectives.validation import region_losses
    from diffratio.sensitivity import verify

    found, transformer = load_sensitivity(measured), build_transformer_of(base).eval()
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 1, 32, 32, generator=generator), torch.arange(8)
    table = ((10, 5), (4, 10), (0, 7))
    answer = verify(found, transformer, images, labels, get_objective("flow"), {"mine": table, "none": None}, 3)
    assert answer["schedules"]["none"] is None
    assert all(torch.equal(value, before[key]) for key, value in transformer.state_dict().items())

    def losses() -> torch.Tensor:
        def predict(inputs: torch.Tensor, levels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return transformer(inputs, timestep=1000 * levels, class_labels=classes, return_dict=False)[0]

        return region_losses(predict, get_objective("flow"), images, labels)

    dense = losses()
    diffratio.apply_(transformer, diffratio.Measured(diffratio.KeepSchedule(table, found.run), found.ranking))
    excess = 1e3 * (losses() - dense).mean()
    assert answer["schedules"]["mine"]["excess_loss_x1000"] == pytest.approx(float(excess), rel=1e-4)
