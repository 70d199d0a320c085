"""A found step schedule as an arm of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparing import DATA, light, make_checkpoints, settings

import diffratio
from diffratio.checkpoint import load_transformer
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import arms, compare_from_config
from diffratio.evaluation.records import read_records
from diffratio.files import write_json
from diffratio.methods.step_front import FrontEntry, StepFront
from diffratio.surgery import describe, find_step_schedule, weights_digest
from diffratio.tokens.grid import TokenGrid


def test_a_front_is_an_arm_at_each_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch, tmp_path)
    checkpoints = make_checkpoints(tmp_path)
    transformer: Any = load_transformer(checkpoints["dense"])
    made = [
        diffratio.StepSchedule.made_for(
            describe(transformer), uniform_run(5, TokenGrid(8, 8)), actions, weights_sha256=weights_digest(transformer)
        )
        for actions in ("CCCRC", "CRCRC")
    ]
    front = StepFront(tuple(FrontEntry(one, 0.8 - 0.2 * at, 0.1 + at) for at, one in enumerate(made)))
    found = tmp_path / "found"
    found.mkdir()
    write_json(found / "front.json", front.to_json())
    changes = {
        "methods": [f"dato@{found}"],
        "finetuned": checkpoints["tuned"],
        "budgets": [0.8, 0.5],
        "validation_n": 0,
    }
    compare_from_config(settings(checkpoints, tmp_path / "out", **changes), DATA.held_out)
    records = {(one.arm.name, one.budget): one for one in read_records(tmp_path / "out")}
    for mark in ("", "@finetuned"):
        steps = records[f"dato@found{mark}", 0.8].arm.method["schedule"]["steps"]
        assert "".join(step["action"] for step in steps) == "CCCRC"
        assert records[f"dato@found{mark}", 0.5].status == "unreachable"
    for path, weights, message in (
        (found, "tuned", "found on weights"),
        (tmp_path / "none.json", "dense", "none.json"),
        ("", "dense", "dato and block_cache alone take a step schedule"),
    ):
        bad = settings(checkpoints, tmp_path / "bad", methods=[f"dato@{path}"]) | {"weights": checkpoints[weights]}
        with pytest.raises(DiffratioError, match=message):
            compare_from_config(bad, DATA.held_out)
    with pytest.raises(DiffratioError, match="dato and block_cache alone take"):
        compare_from_config(settings(checkpoints, tmp_path / "bad", methods=[f"tome@{found}"]), DATA.held_out)


@pytest.mark.parametrize("name", ["fashion-dit", "emoji-pixart"])
def test_shipped_fronts_are_for_their_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A front stands for the checkpoint of its name, unless a file of that name is here."""
    method, file, label = arms._found(f"dato@{name}")
    assert (method, label) == ("dato", f"dato@{name}")
    transformer: Any = load_transformer(name)
    for budget in (0.8, 0.5):
        found = find_step_schedule(str(file), transformer, budget=budget, steps=20)
        diffratio.apply_(transformer, diffratio.DaTo(schedule=found))
        assert budget - 0.06 < diffratio.macs(transformer, steps=20).fraction <= budget
        diffratio.remove_(transformer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert arms._found(f"dato@{name}") == ("dato", name, f"dato@{name}") and arms._found("tome") == (
        "tome",
        None,
        "tome",
    )
