"""A comparison that is killed and started again ends like one that was not; what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparing import DATA, light, make_checkpoints, settings, timeless

from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import compare_from_config, measuring, running
from diffratio.evaluation.compare.folder import ComparisonFolder
from diffratio.evaluation.records import read_records


class Killed(BaseException):
    """Nothing in the package handles it, as with a kill."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    light(monkeypatch, tmp_path)


def compare(checkpoints: dict[str, str], out: Path, **changes: Any) -> dict[str, Any]:
    return compare_from_config(settings(checkpoints, out, **changes), DATA.held_out)


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> None:
    """The n-th call of a folder's method raises before it does anything."""
    original, calls = getattr(ComparisonFolder, name), [0]

    def wrapped(self: ComparisonFolder, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(ComparisonFolder, name, wrapped)


def count_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds that whole sets of samples are generated for."""
    seeds: list[int] = []
    original = running.generate

    def counted(*arguments: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return original(*arguments, **options)

    monkeypatch.setattr(running, "generate", counted)
    return seeds


@pytest.mark.parametrize(("place", "call"), [("begin", 1), ("cache", 1), ("write", 1), ("write", 2), ("write", 4)])
def test_killed_and_started_again_equals_uninterrupted(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    compare(checkpoints, whole, seeds=[0, 1], validation_n=0)
    with monkeypatch.context() as patch:
        stop_at(patch, place, call, Killed())
        with pytest.raises(Killed):
            compare(checkpoints, broken, seeds=[0, 1], validation_n=0)
    assert len(timeless(broken)) < len(timeless(whole)) == 4
    compare(checkpoints, broken, seeds=[0, 1], validation_n=0)
    assert timeless(broken) == timeless(whole)


def test_a_rerun_samples_only_what_is_missing(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compare(checkpoints, out)
    before = timeless(out)
    seeds = count_samples(monkeypatch)
    answer = compare(checkpoints, out)
    assert seeds == [] and answer["finished_before"] == 2 and timeless(out) == before
    compare(checkpoints, out, methods=["tome", "fewer_steps"], budgets=[0.8, 0.6])
    added = {"tome-60-s0", "fewer_steps-80-s0", "fewer_steps-60-s0"}
    assert set(timeless(out)) == set(before) | added
    assert len(seeds) == 3  # the dense samples come from the cache
    assert {key: timeless(out)[key] for key in before} == before
    assert timeless(out)["tome-60-s0"]["quality"]["psnr"]["value"] < 100
    next((out / "cache").glob("dense-*")).write_bytes(b"damaged")
    (out / "records" / "tome-80-s0.json").unlink()
    compare(checkpoints, out)
    assert len(seeds) == 5  # dense again, and tome
    assert {key: timeless(out)[key] for key in before} == before


def test_another_seed_takes_times_and_losses_from_the_first(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, probed = tmp_path / "out", []
    compare(checkpoints, out, latency_repeats=2)
    original = measuring.probe

    def counted(one: Any, *arguments: Any) -> Any:
        probed.append(one.arm.name)
        return original(one, *arguments)

    monkeypatch.setattr(measuring, "region_losses", None)  # called, it would fail
    monkeypatch.setattr(measuring, "probe", counted)
    compare(checkpoints, out, latency_repeats=2, seeds=[0, 1])
    records = {record.id: record for record in read_records(out)}
    assert len(records) == 4 and probed == []
    for name in ("dense-100", "tome-80"):
        first, second = records[f"{name}-s0"], records[f"{name}-s1"]
        assert first.cost == second.cost and first.cost["latency"][0]["median_ms"] > 0
        assert first.quality.get("excess_loss") == second.quality.get("excess_loss")
    assert records["tome-80-s1"].quality["excess_loss"]["value"] != 0
    # on another device everything is measured anew
    for path in (out / "records").glob("*.json"):
        record = json.loads(path.read_text())
        record["provenance"]["device"] = "another"
        path.write_text(json.dumps(record))
    compare(checkpoints, out, latency_repeats=2, seeds=[0, 1, 2])
    assert probed == ["dense", "tome"]
    third = {record.id: record for record in read_records(out)}["tome-80-s2"]
    assert third.cost["latency"] != records["tome-80-s0"].cost["latency"]


def test_an_interrupted_comparison_shows_what_is_there(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reports = tmp_path / "out", []
    report = running.write_report

    def write(path: Path, title: str, compact: bool) -> Any:
        reports.append((path, compact))
        return report(path, title, compact)

    monkeypatch.setattr(running, "write_report", write)
    with monkeypatch.context() as patch:
        stop_at(patch, "write", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compare(checkpoints, out, seeds=[0, 1])
    assert reports == [(out, False)]
    status = {record.id: record.status for record in read_records(out)}
    assert status.pop("dense-100-s0") == "ok" and set(status.values()) == {"cancelled"} and len(status) == 3
    compare(checkpoints, out, seeds=[0, 1], compact=True)
    assert {record.status for record in read_records(out)} == {"ok"}
    assert reports == [(out, False), (out, True)]


def test_a_failed_arm_is_a_record_and_is_done_again(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "out", running.generate

    def failing(pipe: Any, *arguments: Any, **options: Any) -> Any:
        if type(pipe.scheduler).__module__ and getattr(pipe.transformer, "_diffratio", None) is not None:
            raise RuntimeError("out of memory\nand a long trace")
        return original(pipe, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(running, "generate", failing)
        answer = compare(checkpoints, out)
    assert [(row["status"], row["message"]) for row in answer["arms"]] == [("ok", ""), ("failed", "out of memory")]
    assert [row["status"] for row in compare(checkpoints, out)["arms"]] == ["ok", "ok"]


def test_arms_whose_dense_model_fails_are_not_measured_alone(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(running, "generate", failing)
    rows = compare(checkpoints, tmp_path / "out")["arms"]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[1]["message"] == "dense, which it is paired with, failed: broken"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 5}, "n=4, now it is 5"),
        ({"steps": 6}, "steps=5, now it is 6"),
        ({"guidance_scale": 3}, "guidance_scale=2.0, now it is 3.0"),
        ({"validation_n": 0}, "validation_n=4, now it is 0"),
        ({"reference_n": 9}, "reference_n=8, now it is 9"),
        ({"finetuned": "tuned"}, "finetuned=None, now it is"),
        ({"weights": "tuned"}, "weights="),
    ],
)
def test_other_settings_are_refused_by_name(
    checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path_factory.getbasetemp() / "one-comparison"
    if not out.exists():
        compare(checkpoints, out)
    before = timeless(out)
    changes = {
        key: checkpoints.get(value, value) if isinstance(value, str) else value for key, value in changes.items()
    }
    with pytest.raises(DiffratioError) as caught:
        compare(checkpoints, out, **changes)
    assert message in str(caught.value) and "choose another paths.output_dir" in str(caught.value)
    assert timeless(out) == before


def test_what_is_not_of_this_comparison_is_left_alone(checkpoints: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(checkpoints, out)
    foreign = out / "records" / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(DiffratioError, match="is not a record"):
        compare(checkpoints, out, seeds=[1])
    assert foreign.read_text() == "mine"
    foreign.unlink()
    path = out / "records" / "tome-80-s0.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"schema": 99}))
    with pytest.raises(DiffratioError, match="has schema 99"):
        compare(checkpoints, out)
    path.write_text(json.dumps(document | {"arm": document["arm"] | {"weights_sha256": "0"}}))
    with pytest.raises(DiffratioError, match="weights_sha256='0', now it is"):
        compare(checkpoints, out)
    path.write_text(json.dumps(document))
    (out / "compare.json").write_text('{"format": "else"}')
    with pytest.raises(DiffratioError, match="is not a comparison of this version"):
        compare(checkpoints, out)
    (out / "compare.json").unlink()
    with pytest.raises(DiffratioError, match="no compare.json"):
        compare(checkpoints, out)
