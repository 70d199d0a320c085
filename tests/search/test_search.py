"""The verb on a tiny model: deterministic, resumable, and what its folder refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cli import main
from diffratio.errors import DiffratioError
from diffratio.methods.dato import DaTo
from diffratio.methods.fewer_steps import FewerSteps
from diffratio.search import SearchSettings, search
from diffratio.search.judge import Judge, load_judge

pytest.importorskip("pymoo")
TINY = {"steps": 4, "n": 2, "held_out_n": 2, "generations": 2, "population": 6, "device": "cpu", "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    return str(diffratio.export(get_backbone("dit").tiny(), folder, card={"objective": "flow"}))


def config(weights: str, out: Path, **changes: Any) -> dict[str, Any]:
    values = dataclasses.asdict(SearchSettings(weights, str(out))) | TINY | {"batch_size": 8} | changes
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def words(weights: str, out: Path, *more: str) -> list[str]:
    return ["search", f"weights={weights}", f"out={out}", *(f"{key}={value}" for key, value in TINY.items()), *more]


@pytest.fixture(scope="module")
def whole(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing interrupted."""
    out = tmp_path_factory.mktemp("search") / "whole"
    search(config(weights, out))
    return out


def test_the_front_is_one_and_its_figures_are_true(weights: str, whole: Path) -> None:
    document = json.loads((whole / "front.json").read_text())
    entries = document["entries"]
    assert len(entries) >= 3
    assert [one["fraction"] for one in entries] == sorted({one["fraction"] for one in entries})
    assert [one["error"] for one in entries] == sorted((one["error"] for one in entries), reverse=True)
    judge = load_judge(SearchSettings.from_config(config(weights, whole)))
    for one in entries[:: len(entries) // 2]:
        made = DaTo(schedule=diffratio.load_step_schedule(whole, budget=one["fraction"]))
        assert judge.fraction(made) == one["fraction"]
        assert judge.error(made) == pytest.approx(one["error"], abs=1e-12)
        assert judge.error(made, held_out=True) == pytest.approx(one["held_out_error"], abs=1e-12)
    assert {row["name"] for row in document["uniform"]} >= {"uniform fewer steps", "uniform interval"}
    for row in document["against_uniform"]:
        assert row["found_fraction"] is None or row["found_fraction"] <= row["fraction"] + 1e-9
    assert (whole / "front.svg").read_text().startswith("<svg ")


def test_the_search_finds_what_beats_its_seeds(weights: str, tmp_path: Path, whole: Path) -> None:
    """More generations go on from what is known and never lose a point of the front."""
    out = tmp_path / "more"
    out.mkdir()
    (out / "search.json").write_bytes((whole / "search.json").read_bytes())
    first, _ = search(config(weights, out, generations=1))
    more, _ = search(config(weights, out, generations=5))
    assert more["evaluated"] > first["evaluated"] == 6

    def area(document: dict[str, Any]) -> float:
        """Under the front's steps, up to the dense run."""
        ends = [one["fraction"] for one in document["entries"]] + [1.0]
        return sum(one["error"] * (b - a) for one, a, b in zip(document["entries"], ends, ends[1:], strict=False))

    cheapest = [document["entries"][0]["fraction"] for document in (first, more)]
    assert cheapest[1] <= cheapest[0]
    for one in first["entries"]:
        assert any(o["fraction"] <= one["fraction"] and o["error"] <= one["error"] for o in more["entries"])
    assert area(more) < area(first) or cheapest[1] < cheapest[0]


def test_same_seed_same_front_and_another_seed_another(weights: str, whole: Path, tmp_path: Path) -> None:
    search(config(weights, tmp_path / "again"))
    search(config(weights, tmp_path / "other", seed=1))
    same, again, other = ((one / "front.json").read_text() for one in (whole, tmp_path / "again", tmp_path / "other"))
    assert again == same != other


def test_terminated_and_resumed_is_the_same_front(
    weights: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calls = tmp_path / "killed", []
    measure = Judge.error

    def counted(self: Judge, made: Any, held_out: bool = False) -> float:
        calls.append(made)
        if len(calls) in (9, 16):
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, made, held_out)

    monkeypatch.setattr(Judge, "error", counted)
    argv = words(weights, out, "batch_size=8")
    assert main(argv) == 143
    assert "8 evaluations are kept; the same command goes on" in capsys.readouterr().err
    assert len(json.loads((out / "search.json").read_text())["evaluated"]) == 8
    assert not (out / "front.json").exists()
    assert main(argv) == 143
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "14 evaluations stand already" in shown.err and "uniform fewer steps" in shown.out
    assert (out / "front.json").read_text() == (whole / "front.json").read_text()
    known = json.loads((out / "search.json").read_text())["evaluated"]
    assert len(calls) == len(known) + 2  # the two that were cut off, and nothing else twice
    assert main([*argv, "--json"]) == 0  # finished: nothing is evaluated
    assert len(calls) == len(known) + 2
    assert json.loads(capsys.readouterr().out)["known_before"] == len(known)


def test_dropping_steps_is_a_schedule_of_c_and_r(weights: str, tmp_path: Path) -> None:
    document, text = search(config(weights, tmp_path / "fewer", method="fewer_steps", generations=2))
    written = json.loads((tmp_path / "fewer" / "front.json").read_text())
    letters = {step["action"] for one in written["entries"] for step in one["schedule"]["steps"]}
    assert letters == {"C", "R"} and document["parts"] is None
    assert "uniform interval, reused" in text
    judge = load_judge(SearchSettings.from_config(config(weights, tmp_path, method="fewer_steps")))
    even = DaTo(every=2.0, ratio=0.0, action="R", mode="cache")
    assert judge.error(even) == pytest.approx(judge.error(FewerSteps(keep=0.5)), rel=1e-4)
    assert judge.fraction(even) == pytest.approx(judge.fraction(FewerSteps(keep=0.5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": -3}, "population must be at least 4, got -3"),
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"method": "tome"}, "unknown method to search 'tome'"),
        ({"actions": ["C", "Z"]}, "unknown action 'Z'"),
        ({"actions": ["S"]}, "lacks C"),
        ({"actions": ["C"], "ratios": []}, "there is one schedule"),
        ({"ratios": [0.9]}, "ratio 0.9 is outside"),
        ({"ratios": 0.5}, "it takes a list"),
        ({"steps": "many"}, "it takes an integer"),
        ({"error": "fid"}, "unknown search error"),
        ({"weights": "no-such"}, "no-such"),
        ({"prompts": ["a cat"]}, "is sampled by class, not by text: leave prompts out"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str, weights: str, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        search(config(weights, tmp_path / "out") | changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"n": 3}, {"steps": 5}, {"ratios": [0.5]}, {"seed": 2}, {"population": 7}])
def test_the_folder_of_another_search_is_refused(changes: dict[str, Any], weights: str, whole: Path) -> None:
    key = "run" if "steps" in changes else next(iter(changes))
    with pytest.raises(DiffratioError, match=f"was begun with {key}=.*choose another out"):
        search(config(weights, whole, **changes))


def test_the_folder_of_other_weights_is_refused(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = diffratio.export(get_backbone("dit").tiny(), tmp_path / "tiny", card={"objective": "flow"})
    with pytest.raises(DiffratioError, match="was begun with weights"):
        search(config(str(other), whole))
    made = diffratio.load_transformer(other)
    with pytest.raises(DiffratioError, match="found on weights .* and these are"):
        diffratio.find_step_schedule(whole, made, budget=0.6, steps=4)


def test_pymoo_is_named_where_it_is_missing(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffratio.search.nsga", raising=False)
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(DiffratioError, match=r"search needs pymoo.*diffratio\[search\]"):
        search(config(weights, tmp_path / "out"))
