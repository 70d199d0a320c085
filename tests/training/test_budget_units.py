"""Training onto milliseconds and onto a mean keep ratio."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cost_tables import STEP_BINS, latency_table
from tiny_run import column, job, train_tiny

import diffratio
from diffratio.backbones import get_backbone
from diffratio.checkpoint import load_transformer, read_card
from diffratio.cost.run import uniform_run
from diffratio.cost.table import save_cost_table
from diffratio.errors import DiffratioError
from diffratio.routing.schedule import KeepSchedule
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.prompted import prompted_levels
from diffratio.sampling.schedulers import default_sampler, make_scheduler
from diffratio.tokens.grid import TokenGrid
from diffratio.training.build import budget_run
from diffratio.training.run import check, compose, export_run
from diffratio.training.settings import BudgetSettings

RUN = uniform_run(20, TokenGrid(4, 4))
ONE = ["trainer.max_steps=1", "trainer.val_check_interval=1"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A stepped table of the tiny model, tokens in pairs."""
    save_cost_table(tmp_path / "table.json", latency_table(alignment=2))
    return tmp_path / "table.json"


def words(table: Path, *more: str) -> list[str]:
    return ["budget=latency", f"budget.table={table}", *more]


def test_diffcr_learns_onto_milliseconds(
    data: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    result = train_tiny(data, run, *words(table))
    costs = latency_table(alignment=2).costs(RUN)
    # on the budget at every step while ratios are learned, and within it once they are bins
    ramp = BudgetSettings(target=0.8, anneal=0.3, freeze=0.5)
    reached = column(run, "ratios/budget")
    assert [reached[step] for step in range(4)] == pytest.approx([ramp.at((s + 1) / 8) for s in range(4)], abs=1e-5)
    bins = result["schedule"]
    assert {bin_ for row in bins for bin_ in row} <= set(STEP_BINS) and min(map(min, bins)) < 10
    assert 0.79 <= costs.fraction(bins) <= 0.8 and result["budget_fraction"] == pytest.approx(costs.fraction(bins))
    assert result["budget_unit"] == "latency" and result["rounding"]["latency"] == costs.fraction(bins)
    assert result["macs_fraction"] != pytest.approx(result["budget_fraction"], abs=1e-3)
    assert result["rounding"]["macs"] == pytest.approx(result["macs_fraction"])
    # promised and reached
    found = result["latency"]
    assert found["promised_dense_ms"] == pytest.approx(20 * 31)
    assert found["promised_ms"] == pytest.approx(20 * 31 * costs.fraction(bins))
    assert found["device"] == "a machine" and "1 threads" in found["reached_on"] and found["batch"] == 2
    assert found["reached_ms"] > 0 and found["reached_dense_ms"] > 0 and found["reached_fraction"] > 0
    printed = capsys.readouterr().out
    assert "milliseconds 0.7" in printed or "milliseconds 0.8" in printed
    assert f"latency: promised {found['promised_ms']:.1f} of 620.0 ms a run" in printed
    assert f"reached {found['reached_ms']:.1f} of" in printed
    # the export computes pairs of tokens, wherever it is loaded
    config: Any = diffratio.surgery.attachment(load_transformer(run / "export")).token_method.config
    schedule = config.schedule
    assert (schedule.unit, schedule.alignment, schedule.allowed_bins) == ("latency", 2, STEP_BINS)
    assert read_card(run / "export").metrics["latency"]["promised_ms"] == found["promised_ms"]
    # neither resume nor export needs the table again
    table.unlink()
    assert export_run(str(run), str(tmp_path / "again"))["macs_fraction"] == result["macs_fraction"]
    resumed = train_tiny(data, run, *words(table), "ckpt_path=last")
    assert resumed["schedule"] == bins and resumed["latency"]["promised_ms"] == found["promised_ms"]


def test_ratios_are_learned_at_the_token_counts_of_the_table(data: Path, tmp_path: Path) -> None:
    from diffratio.training.build import build_module
    from diffratio.training.run import plain_config

    save_cost_table(tmp_path / "table.json", latency_table(alignment=8))
    module = build_module(plain_config(compose("train", job(data, Path("x"), *words(tmp_path / "table.json")))), None)
    method: Any = module.method
    assert method.keep(3, 16) == 8 and method.keep(6, 16) == 16


def test_a_mean_ratio_is_met(data: Path, tmp_path: Path) -> None:
    result = train_tiny(data, tmp_path / "run", "budget=mean_ratio", "budget.target=0.7")
    counts = RUN.region_counts(4)
    total = sum(count * bin_ for row in result["schedule"] for count, bin_ in zip(counts, row, strict=True))
    assert 0.69 <= total / (10 * 3 * 20) <= 0.7 and result["budget_unit"] == "mean_ratio"
    assert result["budget_fraction"] == pytest.approx(total / 600) == result["rounding"]["mean_ratio"]
    assert "latency" not in result and result["macs_fraction"] > 0.7
    reached = column(tmp_path / "run", "ratios/budget")
    assert reached[3] == pytest.approx(0.7, abs=1e-5)


@pytest.mark.parametrize("method", ["mod", "hand", "random_keep", "block_drop"])
def test_rules_are_solved_for_milliseconds(data: Path, tmp_path: Path, table: Path, method: str) -> None:
    found = check(compose("train", job(data, tmp_path / "run", *words(table, f"method={method}"))))
    assert found["budget"]["unit"] == "latency"
    assert found["milliseconds"]["allowed_bins"] == list(STEP_BINS)
    assert found["milliseconds"]["dense_run"] == pytest.approx(620)
    result = train_tiny(data, tmp_path / "run", *words(table, f"method={method}", *ONE))
    assert 0.79 <= result["budget_fraction"] <= 0.8
    assert {bin_ for row in result["schedule"] for bin_ in row} <= set(STEP_BINS)
    assert result["latency"]["promised_fraction"] == result["budget_fraction"]


def test_the_dense_control_promises_the_dense_run(data: Path, tmp_path: Path, table: Path) -> None:
    result = train_tiny(data, tmp_path / "run", *words(table, "method=dense", *ONE))
    assert result["budget_fraction"] == 1.0
    assert result["latency"]["promised_ms"] == result["latency"]["promised_dense_ms"] == pytest.approx(620)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=latency"], "budget.unit=latency counts the milliseconds of a cost table: make one"),
        (["budget.table=x.json"], "budget.table='x.json' is for budget.unit=latency, and the unit is macs"),
        (["budget.unit=seconds"], "unknown budget.unit 'seconds': known are latency, macs, mean_ratio"),
        (["budget=latency", "budget.table=none.json"], "budget.table=none.json: cost table: no file 'none.json'"),
        (["budget=latency", "budget.table=3"], "budget.table=3: it takes text or null"),
        (["budget=latency", "budget.table=TABLE", "backbone.config.num_layers=2"], "this is dit of 2 blocks, width 32"),
        (["budget=latency", "budget.table=TABLE", "backbone.config.patch_size=4"], "4x4 tokens, and this is"),
        (["budget=latency", "budget.table=TABLE", "backbone.config.attention_head_dim=8"], "width 16"),
        (["budget=latency", "budget.table=TABLE", "budget.target=0.05"], "that every bin at 1 costs"),
    ],
)
def test_tables_and_units_that_do_not_serve_are_refused(
    data: Path, tmp_path: Path, table: Path, overrides: list[str], message: str
) -> None:
    given = [one.replace("TABLE", str(table)) for one in overrides]
    with pytest.raises(DiffratioError) as caught:
        check(compose("train", job(data, tmp_path / "run", *given)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DiffratioError):
        train_tiny(data, tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_other_alignment_is_refused(data: Path, tmp_path: Path, table: Path) -> None:
    given = tmp_path / "schedule.json"
    given.write_text(json.dumps(KeepSchedule(((10, 6), (6, 6), (10, 10)), RUN, 0.8).to_json()))
    with pytest.raises(DiffratioError, match="multiples of 1 and budget.table=.* was timed in multiples of 2"):
        train_tiny(data, tmp_path / "run", *words(table, f"+method.schedule={given}"))


@pytest.mark.parametrize("objective", ["flow", "flow_sample", "noise"])
def test_a_budget_counts_the_regions_that_the_default_sampler_visits(objective: str) -> None:
    """Of 20 steps, some stand on the edge of a region for one sampler and below it for another."""
    transformer = get_backbone("dit").tiny()
    run = budget_run({"objective": {"name": objective}}, transformer, BudgetSettings(steps=20))
    pipe = build_pipeline(transformer, make_scheduler(default_sampler(objective), objective))
    visited = replace(run, noise_levels=prompted_levels(pipe, 20))
    assert run.region_counts(4) == visited.region_counts(4)
    assert run.noise_levels == pytest.approx(visited.noise_levels)
