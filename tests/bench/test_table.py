"""The loop, its arithmetic and its failures; no test asserts how fast anything is."""

from __future__ import annotations

import json

import pytest
import torch

from diffratio.bench import table
from diffratio.bench.settings import BenchSettings
from diffratio.bench.table import Row, Variant, measure, memory_growth, text
from diffratio.cost.latency import timing

SETTINGS = BenchSettings(repeats=3, warmup=1)


def fails() -> None:
    raise ValueError("no such thing\nand more")


def test_all_variants_are_called_alike_and_in_one_loop() -> None:
    calls: list[str] = []
    variants = {name: Variant(lambda name=name: calls.append(name), 1.0, "a") for name in "abc"}  # type: ignore[misc]
    rows = measure("group", variants, SETTINGS, "cpu")
    assert "".join(calls) == "abc" + "abc" + "abcbcacab" + "abc"  # tried, warmed up, timed, memory
    assert [(row.variant, row.timing and row.timing.repeats) for row in rows] == [("a", 3), ("b", 3), ("c", 3)]


def test_figures_come_from_times_of_the_same_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "dense": [10.0, 20.0, 30.0],
        "routed": [6.0, 12.0, 18.0],
        "short": [5.0, 10.0, 15.0],
        "train": [5.0, 10.0, 15.0],
    }
    monkeypatch.setattr(table, "interleaved", lambda *a: {name: timing(values) for name, values in times.items()})
    variants = {
        "dense": Variant(lambda: None, 1.0),
        "routed": Variant(lambda: None, 0.5, short="short"),
        "short": Variant(lambda: None, 0.5),
        "train": Variant(lambda: None, 0.5, scores=False),
    }
    dense, routed, short, train = measure("group", variants, SETTINGS, "cpu")
    assert (dense.time, dense.efficiency, dense.overhead) == (1.0, None, None)
    assert routed.time == pytest.approx(0.6) and routed.efficiency == pytest.approx(0.8)
    assert routed.overhead == pytest.approx(1.2) and routed.speed == pytest.approx(1 / 0.6)
    assert short.efficiency == pytest.approx(1.0) and short.overhead is None
    assert train.time == pytest.approx(0.5) and train.efficiency is None


def test_a_failure_is_a_row_and_the_others_are_measured() -> None:
    variants = {
        "dense": Variant(lambda: None, 1.0),
        "broken": Variant(fails, 0.5, facts={"kind": "peer"}),
        "absent": Variant(None, status="does not attach", note="no hooks"),
    }
    dense, broken, absent = measure("group", variants, SETTINGS, "cpu")
    assert dense.status == "measured" and dense.timing is not None
    assert (broken.status, broken.note) == ("failed", "ValueError: no such thing") and broken.timing is None
    assert (absent.status, absent.note) == ("does not attach", "no hooks")
    document = broken.to_json()
    assert document["repeats"] == 0 and document["kind"] == "peer" and document["median_ms"] is None
    json.dumps([row.to_json() for row in (dense, broken, absent)], allow_nan=False)


def test_without_a_dense_time_there_is_no_bench() -> None:
    with pytest.raises(RuntimeError, match="dense failed, so nothing can be compared .ValueError: no such thing"):
        measure("group", {"dense": Variant(fails, 1.0), "other": Variant(lambda: None, 0.5)}, SETTINGS, "cpu")


def test_memory_is_what_a_call_adds() -> None:
    growth = memory_growth(lambda: torch.ones(64, 1024, 1024), "cpu")  # 256 MiB
    assert growth is None or 200 < growth < 400
    idle = memory_growth(lambda: None, "cpu")
    assert idle is None or idle < 50


def test_text_leaves_empty_columns_out_and_keeps_groups_apart() -> None:
    rows = [
        Row("first", "dense", 1.0, timing([2.0, 2.0]), 1.0),
        Row("first", "gone", status="unreachable", note="too low"),
        Row("second", "dense", 1.0, timing([3.0]), 1.0, overhead=1.5),
    ]
    lines = text("title", rows, ["a note"]).splitlines()
    assert lines[0] == "title" and lines[-1] == "a note"
    first, second = lines.index("first"), lines.index("second")
    assert "overhead" not in lines[first + 1] and "overhead" in lines[second + 1]
    assert "unreachable: too low" in lines[first + 3] and " - " in lines[first + 3]
    assert "1.500" in lines[second + 2]
