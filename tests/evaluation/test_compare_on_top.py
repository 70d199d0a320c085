"""Step-level methods on top of routed arms: what they cost together, what is recorded, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparing import DATA, light, make_checkpoints, settings

import diffratio
from diffratio.checkpoint import load_transformer
from diffratio.cost.run import uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.evaluation.compare import compare_from_config
from diffratio.evaluation.records import read_records
from diffratio.surgery import describe, for_budget_on_top, on_top
from diffratio.tokens.grid import TokenGrid

TOPS = ["block_cache", "fewer_steps", "guidance_interval"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def schedule(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A step schedule of 10 steps, of which 7 are computed."""
    transformer: Any = load_transformer(checkpoints["dense"])
    path = tmp_path_factory.mktemp("schedules") / "found.json"
    made = diffratio.StepSchedule.made_for(describe(transformer), uniform_run(10, TokenGrid(8, 8)), "CCXCCCRCRC")
    made.save(path)
    return str(path)


def test_caches_stand_on_routed_arms(
    checkpoints: dict[str, str], schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is counted by torch too (no flags), and a budget that the routed arm meets alone is not asked of it."""
    light(monkeypatch, tmp_path, probes=True)
    names = [*TOPS, f"block_cache@{schedule}"]
    changes = {
        "methods": [],
        "routed": [checkpoints["routed"]],
        "on_routed": names,
        "budgets": [0.8, 0.56],
        "steps": 10,
    }
    compare_from_config(settings(checkpoints, tmp_path / "out", **changes), DATA.held_out)
    records = {(one.arm.name, one.budget): one for one in read_records(tmp_path / "out")}
    tops = [f"mod-0.8+{name}" for name in (*TOPS, "block_cache@found")]
    assert set(records) == {("dense", 1.0), ("mod", 0.8), *((name, 0.56) for name in tops)}
    for name in tops:
        record = records[name, 0.56]
        assert (record.status, record.flags) == ("ok", ()), (record.message, record.flags)
        assert (
            0.54 <= record.cost["fraction"] <= 0.56 and record.cost["fraction"] < records["mod", 0.8].cost["fraction"]
        )
        assert record.arm.method["name"] == "mod" and record.paired_with == "dense"
        assert record.arm.method["on_top"]["name"] == name.split("+")[1].split("@")[0]
        assert record.schedule == records["mod", 0.8].schedule
        assert "excess_loss" not in record.quality  # single forwards do not stand for it
    assert records["mod-0.8+fewer_steps", 0.56].run.steps == 7


def test_what_was_out_of_reach_is_measured_once_it_is_not(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch, tmp_path)
    given = settings(
        checkpoints, tmp_path / "out", methods=[], routed=[checkpoints["routed"]], on_routed=["block_cache"],
        budgets=[0.5], steps=10, validation_n=0,
    )  # fmt: skip
    for gap, status in ((-1, "unreachable"), (-1, "unreachable"), (0.04, "ok")):
        monkeypatch.setattr(on_top, "GAP", gap)
        compare_from_config(given, DATA.held_out)
        records = {one.arm.name: one for one in read_records(tmp_path / "out")}
        assert records["mod-0.8+block_cache"].status == status


def test_budgets_on_top(checkpoints: dict[str, str], schedule: str) -> None:
    transformer: Any = load_transformer(checkpoints["routed"])
    run = uniform_run(10, TokenGrid(8, 8))
    config = for_budget_on_top("block_cache", transformer, 0.49, run)
    diffratio.apply_(transformer, config)
    assert 0.45 <= diffratio.macs(transformer, run=run).fraction <= 0.49
    transformer = load_transformer(checkpoints["routed"])
    for budget, file in ((0.9, None), (0.05, None), (0.3, schedule)):
        with pytest.raises(BudgetUnreachable):
            for_budget_on_top("block_cache", transformer, budget, run, file)
    for name, why in (("tome", "token-level"), ("diffcr", "trained"), ("external_cache", "priced by running")):
        with pytest.raises(DiffratioError, match=f"'{name}' is {why}.*block_cache"):
            for_budget_on_top(name, transformer, 0.5, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_routed": ["tome"]}, "'tome' is token-level"),
        ({"on_routed": ["block_cach"]}, "did you mean block_cache"),
        ({"on_routed": ["fewer_steps@x.json"]}, "dato and block_cache alone take"),
        ({"on_routed": ["block_cache"], "routed": []}, "there are none: give them in"),
    ],
)
def test_what_cannot_go_on_top_is_one_line(
    changes: dict[str, Any], message: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    given = settings(checkpoints, tmp_path, **({"routed": [checkpoints["routed"]]} | changes))
    with pytest.raises(DiffratioError, match=message):
        compare_from_config(given, DATA.held_out)
    assert not any(tmp_path.iterdir())
