"""Records: what is written is read back, and what is not a record is refused."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabricate import make_record

from diffratio.errors import DiffratioError
from diffratio.evaluation import records as module
from diffratio.evaluation.records import Arm, Record, provenance, read_records, record_id, write_record


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = make_record(schedule={"bins": [[10, 10, 8, 4], [0, 1, 2, 3]]})
    path = write_record(tmp_path, record)
    assert path == tmp_path / "records" / "diffcr-80-s0.json"
    assert read_records(tmp_path) == [record]
    assert json.loads(path.read_text())["schema"] == 1


def test_an_unmeasured_record_needs_only_what_was_asked_for(tmp_path: Path) -> None:
    record = Record(Arm("todo", "start", {"name": "todo"}), 0.6, 2, status="unreachable", message="no")
    write_record(tmp_path, record)
    (found,) = read_records(tmp_path)
    assert (found.id, found.quality, found.run) == ("todo-60-s2", {}, None)


def test_null_parts_read_as_empty() -> None:
    document = {**make_record().to_json(), "cost": None, "quality": None, "images": None}
    record = Record.from_json(document)
    assert (record.cost, record.quality, record.images) == ({}, {}, {})


@pytest.mark.parametrize(
    ("arm", "budget", "seed", "expected"),
    [
        ("diffcr", 0.8, 0, "diffcr-80-s0"),
        ("diffcr", 0.57, 1, "diffcr-57-s1"),
        ("tome", 0.825, 0, "tome-82.5-s0"),
        ("dense", 1.0, 3, "dense-100-s3"),
        ("../a b/<c>", 1, 0, "a-b-c-100-s0"),
    ],
)
def test_ids_are_safe_file_names(arm: str, budget: float, seed: int, expected: str) -> None:
    assert record_id(arm, budget, seed) == expected


def test_records_come_in_a_fixed_order(tmp_path: Path) -> None:
    for name, budget, seed in (("tome", 0.6, 0), ("dense", 1.0, 0), ("diffcr", 0.6, 1), ("diffcr", 0.6, 0)):
        write_record(tmp_path, make_record(name, budget, seed))
    assert [r.id for r in read_records(tmp_path)] == ["dense-100-s0", "diffcr-60-s0", "diffcr-60-s1", "tome-60-s0"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = write_record(tmp_path, make_record(kid=2.0))
    before = path.read_bytes()
    with pytest.raises(DiffratioError, match="exists already"):
        write_record(tmp_path, make_record(kid=3.0))
    assert path.read_bytes() == before
    write_record(tmp_path, make_record(kid=3.0), replace=True)
    assert read_records(tmp_path)[0].quality["kid_lite0"]["value"] == 3.0


def test_replacing_refuses_what_is_not_a_record(tmp_path: Path) -> None:
    path = tmp_path / "records" / "diffcr-80-s0.json"
    path.parent.mkdir()
    path.write_text('{"mine": 1}')
    with pytest.raises(DiffratioError, match="not a record"):
        write_record(tmp_path, make_record(), replace=True)
    assert path.read_text() == '{"mine": 1}'


def test_a_value_that_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="plain data"):
        write_record(tmp_path, make_record(provenance={"device": object()}))
    assert list((tmp_path / "records").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "hello", "not a record"),
        ("x.json", "hello", "cannot be read as JSON"),
        ("x.json", "[1, 2]", "not a record"),
        ("x.json", '{"a": 1}', "not a record"),
        ("x.json", '{"schema": 2}', "schema 2"),
        ("x.json", '{"schema": 1}', "not a record"),
    ],
)
def test_foreign_files_are_refused_and_left_alone(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_record(tmp_path, make_record())
    path = tmp_path / "records" / name
    path.write_text(content)
    with pytest.raises(DiffratioError, match=message):
        read_records(tmp_path)
    assert path.read_text() == content


def test_leftovers_of_an_interrupted_write_are_ignored(tmp_path: Path) -> None:
    write_record(tmp_path, make_record())
    (tmp_path / "records" / ".diffcr-60-s0.json.123.tmp").write_text("{")
    assert len(read_records(tmp_path)) == 1


def test_a_second_record_of_the_same_thing_is_refused(tmp_path: Path) -> None:
    path = write_record(tmp_path, make_record())
    (path.parent / "copy.json").write_bytes(path.read_bytes())
    with pytest.raises(DiffratioError, match="rename it"):
        read_records(tmp_path)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="not a comparison folder"):
        read_records(tmp_path)
    (tmp_path / "records").mkdir()
    with pytest.raises(DiffratioError, match="holds no records"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status"),
        ({"budget": 1.2}, "budget"),
        ({"budget": True}, "budget"),
        ({"seed": 0.5}, "seed"),
        ({"n": "many"}, "n must be"),
        ({"schedule": {"bins": [[11, 1]]}}, "0..10"),
        ({"schedule": {"bins": [[1, 1], [1]]}}, "same number of regions"),
        ({"schedule": {"bins": []}}, "layer"),
        ({"quality": {"psnr": "high"}}, "quality psnr"),
        ({"quality": {"psnr": float("nan")}}, "finite"),
        ({"quality": {"kid_lite0": {"low": 1.0}}}, "'value'"),
        ({"cost": {"fraction": "0.8"}}, "fraction"),
        ({"cost": {"latency": [{"mode": "eager"}]}}, "batch"),
        ({"images": {"samples": "../../secret.png"}}, "relative"),
        ({"images": {"samples": "/etc/secret.png"}}, "relative"),
        ({"images": {"masks": ["a.svg"]}}, "PNG"),
        ({"extra": {"block": {"title": "x"}}}, "rows"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        replace(make_record(), **changes)
    document = {**make_record().to_json(), **changes}
    with pytest.raises(DiffratioError, match=message):
        Record.from_json(document)


def test_unknown_keys_and_wrong_ids_are_named() -> None:
    document = make_record().to_json()
    with pytest.raises(DiffratioError, match="did you mean quality"):
        Record.from_json({**document, "qualty": {}})
    with pytest.raises(DiffratioError, match="did you mean weights"):
        Record.from_json({**document, "arm": {**document["arm"], "weigths": ""}})
    with pytest.raises(DiffratioError, match="id is 'else'"):
        Record.from_json({**document, "id": "else"})
    with pytest.raises(DiffratioError, match="sampling run"):
        Record.from_json({**document, "run": {"grid": [1, 1]}})


def test_provenance_names_packages_and_device() -> None:
    found = provenance(extractor="lite0@96:abc")
    assert found["packages"]["torch"].count(".") >= 1
    assert found["extractor"] == "lite0@96:abc"
    assert found["device"] and found["python"] and found["created"].endswith("+00:00")


def test_git_state_tells_clean_from_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    assert module._git_state(tmp_path) is None
    (tmp_path / "records.py").write_text("a")
    git("add", "records.py")
    git("commit", "-q", "-m", "a")
    clean = module._git_state(tmp_path)
    assert clean is not None and len(clean) == 12
    (tmp_path / "records.py").write_text("b")
    assert module._git_state(tmp_path) == f"{clean}-dirty"


def test_flags_and_pairing_survive_the_disk_and_are_checked(tmp_path: Path) -> None:
    record = make_record(flags=["ignores the seed"], paired_with="dense", sampler_settings={"shift": 3.0})
    write_record(tmp_path, record)
    (found,) = read_records(tmp_path)
    assert found == record and found.flags == ("ignores the seed",)
    old = {key: value for key, value in record.to_json().items() if key not in ("flags", "paired_with")}
    assert Record.from_json(old).flags == ()
    for changes in ({"flags": "text"}, {"flags": [1]}, {"paired_with": 1}):
        with pytest.raises(DiffratioError, match=next(iter(changes))):
            replace(record, **changes)
