"""Fronts and published masks: which schedule a budget takes, and what lists are read as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.run import uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.files import write_json
from diffratio.methods import config_from_json
from diffratio.methods.step_front import FrontEntry, StepFront
from diffratio.methods.step_masks import from_mask
from diffratio.methods.step_schedule import StepSchedule
from diffratio.surgery import describe, weights_digest
from diffratio.tokens.grid import TokenGrid

TRANSFORMER: Any = get_backbone("dit").tiny()
MODEL, RUN = describe(TRANSFORMER), uniform_run(8, TokenGrid(4, 4))
DIGEST = weights_digest(TRANSFORMER)


def letters(schedule: StepSchedule, steps: int = 8) -> str:
    return "".join(one.action for one in schedule.over(steps))


def entry(actions: str, error: float, digest: str = DIGEST) -> FrontEntry:
    made = StepSchedule.made_for(MODEL, RUN, actions, weights_sha256=digest)
    return FrontEntry(
        made, diffratio.macs(diffratio.apply_(dit(), diffratio.DaTo(schedule=made)), run=RUN).fraction, error
    )


def dit() -> Any:
    return get_backbone("dit").tiny()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("front")
    front = StepFront((entry("CCCCCCCC", 0.0), entry("CRCRCRCR", 0.3), entry("CCCCCCRR", 0.1)))
    assert StepFront.from_json(front.to_json()) == front
    write_json(found / "front.json", front.to_json())
    return found


@pytest.mark.parametrize(("budget", "expected"), [(1.0, "C" * 8), (0.99, "CCCCCCRR"), (0.5, "CRCRCRCR")])
def test_a_budget_takes_the_dearest_within_it(folder: Path, budget: float, expected: str) -> None:
    for path in (folder, folder / "front.json"):
        assert letters(diffratio.load_step_schedule(path, budget=budget)) == expected
    found = diffratio.find_step_schedule(folder, TRANSFORMER, budget=budget, run=RUN)
    assert letters(found) == expected
    made: Any = config_from_json({"name": "dato", "schedule": str(folder), "budget": budget})
    assert made.schedule == found


def test_another_step_count_is_priced_anew(folder: Path) -> None:
    """Half of eight steps are two of three: the budget is that of the run at hand, not of the searched one."""
    run = uniform_run(3, TokenGrid(4, 4))
    found = diffratio.find_step_schedule(folder, TRANSFORMER, budget=0.7, run=run)
    cost = diffratio.macs(diffratio.apply_(dit(), diffratio.DaTo(schedule=found)), run=run)
    assert cost.fraction == pytest.approx(2 / 3)
    with pytest.raises(BudgetUnreachable, match="no cheaper schedule"):
        diffratio.find_step_schedule(folder, TRANSFORMER, budget=0.5, run=run)  # which the recorded costs would allow


def test_what_a_front_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="3 schedules from 0.500 to 1.000 .*with a budget"):
        diffratio.load_step_schedule(folder)
    with pytest.raises(BudgetUnreachable, match="0.500 to 1.000"):
        diffratio.load_step_schedule(folder, budget=0.4)
    with pytest.raises(DiffratioError, match="is carried over to 2 to 32 steps, and this run has 40"):
        diffratio.find_step_schedule(folder, TRANSFORMER, budget=0.5, steps=40)
    with pytest.raises(DiffratioError, match="does not fit dit with 2 blocks"):
        diffratio.find_step_schedule(folder, get_backbone("dit").tiny(num_layers=2), budget=0.5, run=RUN)
    write_json(tmp_path / "front.json", StepFront((entry("CRCRCRCR", 0.3, "0" * 64),)).to_json())
    with pytest.raises(DiffratioError, match="found on weights 000000000000, and these are"):
        diffratio.find_step_schedule(tmp_path, TRANSFORMER, budget=0.5, run=RUN)
    kept = diffratio.find_step_schedule(tmp_path, TRANSFORMER, budget=0.5, run=RUN, same_weights=False)
    assert letters(kept) == "CRCRCRCR"
    for document in ({"format": "x"}, {"format": "diffratio step front", "version": 2}, {"entries": []}):
        write_json(tmp_path / "front.json", document)
        with pytest.raises(DiffratioError, match="not a step"):
            diffratio.load_step_schedule(tmp_path, budget=0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 0, 1, 0, 0, 1, 0, 0]", "CRCRRCRR"),
        ("1 0 1 0\n0 1 0 0\n", "CRCRRCRR"),
        ("[0, 2, 5]", "CRCRRCRR"),
        ("0,2,5", "CRCRRCRR"),
        ("[999, 760, 370]", "CRCRRCRR"),
        ("[true, false, true, false]", "CCRRCCRR"),  # of four steps, carried over to eight
    ],
)
def test_published_lists(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.txt"
    path.write_text(text)
    found = diffratio.find_step_schedule(path, TRANSFORMER, run=RUN)
    assert letters(found) == expected and found.weights_sha256 is None
    assert letters(from_mask([0, 1], MODEL, RUN, cached="S")) == "CCSSSSSS"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0, 1, 1, 1, 1, 1, 1, 1]", "first step is not computed"),
        ("[0, 9]", "the run has 8 steps"),
        ("[5, 0, 7]", "the run has 8 steps"),
        ("[1.5]", "0 and 1 for every step"),
        ("[]", "0 and 1 for every step"),
        ("yes no", "got 'yes no'"),
        ("[4000, 20]", "falling timesteps below 1000"),
    ],
)
def test_other_lists_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.txt"
    path.write_text(text)
    with pytest.raises(DiffratioError, match=message) as caught:
        diffratio.find_step_schedule(path, TRANSFORMER, run=RUN)
    assert "mask.txt" in str(caught.value) and "\n" not in str(caught.value)
