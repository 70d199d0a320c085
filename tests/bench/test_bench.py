"""Each bench by the command line, with tiny amounts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffratio.bench.methods import training_free
from diffratio.bench.planning import planning_share
from diffratio.catalog import METHODS
from diffratio.cli import main
from diffratio.methods.base import get_method
from diffratio.methods.diffcr import ESTIMATORS

PLANNING = ("tome", "tofu", "todo", "sdtm", "sdtm_cached", "importance", "lite_uncond", "dato")
FEW = ["debug=cpu", "repeats=1", "warmup=0", "threads=1", "--json"]


def bench(capsys: pytest.CaptureFixture[str], kind: str, *words: str) -> dict[str, Any]:
    """The document of a bench; its rows, by variant, under `by`."""
    assert main(["bench", kind, *FEW, *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bench"] == kind and document["threads"] == 1 and document["provenance"]["device"]
    document["by"] = {row["variant"]: row for row in document["rows"]}
    for row in document["rows"]:
        assert row["repeats"] == (1 if row["status"] == "measured" else 0)
        if row["status"] == "measured":
            assert row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["speed"] * row[
                "time_fraction"
            ] == pytest.approx(1)
    return document


def test_routing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "routing.json"
    threads = torch.get_num_threads()
    found = bench(capsys, "routing", "tokens=[16,64]", "keep=[0.3,0.8]", "batches=[1,2]", f"out={out}")
    assert torch.get_num_threads() == threads
    assert len({row["group"] for row in found["rows"]}) == 4 and len(found["rows"]) == 4 * 10
    by = found["by"]  # the last group: N = 64, batch 2
    for part in ("block", "model"):
        dense, routed, short = by[f"{part}, dense"], by[f"{part}, routed 0.3"], by[f"{part}, dense on 20"]
        assert dense["macs_fraction"] == 1 and dense["efficiency"] is None
        assert 0.2 < short["macs_fraction"] < routed["macs_fraction"] < 0.4
        assert routed["overhead"] == pytest.approx(routed["median_ms"] / short["median_ms"])
        expected = (1 - routed["time_fraction"]) / (1 - routed["macs_fraction"])
        assert routed["efficiency"] == pytest.approx(expected)
        assert by[f"{part}, routed 0.8"]["kept"] == 52
    assert json.loads(out.read_text())["rows"] == found["rows"]


def test_methods_lists_every_training_free_method_and_every_peer(capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["tomesd", "first_block_cache", "sea_cache"]
    found = bench(capsys, "methods", "depth=2", "tokens=16", f"peers=[{','.join(peers)}]")
    names = [name for name in METHODS if name != "dense" and not get_method(name).learned]
    assert list(found["by"]) == ["dense", *names, *(f"peer {name}" for name in peers)]
    assert training_free() == names and {"tome", "fewer_steps"} <= set(names)
    for name in names:
        row = found["by"][name]
        assert row["note"] or row["status"] == "measured"
        assert row["status"] != "measured" or row["macs_fraction"] <= 0.8
        planned = row["planning_fraction"]
        assert (planned is None) == (name not in PLANNING or row["status"] != "measured")
        assert planned is None or 0 < planned < 1
    assert sum(row["planning_fraction"] is not None for row in found["rows"]) >= 3
    assert found["by"]["fewer_steps"]["macs_fraction"] == pytest.approx(0.8)
    assert found["by"]["peer sea_cache"]["status"] == "does not attach"


def test_planning_is_timed_once_and_leaves_no_trace() -> None:
    class Slow(get_method("tome")):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def begin_step(self, ctx: Any) -> None:
            self.plan(0, "self_attention", torch.zeros(1), ctx)

        def plan(self, layer: int, site: str, x: Any, ctx: Any) -> None:
            time.sleep(0.02)

    method = Slow()

    def call() -> None:
        method.begin_step(None)
        time.sleep(0.06)

    assert 0.15 < planning_share(call, [method], "cpu") < 0.35
    assert not vars(method)


def test_methods_out_of_reach_are_rows_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "methods", "depth=1", "tokens=16", "budget=0.05", "peers=[]", "steps=2")
    assert found["by"]["tome"]["status"] == "unreachable" and "cannot reach a budget" in found["by"]["tome"]["note"]
    assert found["by"]["dense"]["status"] == "measured"


def test_training_times_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["backbone=dit_fashion", "backbone.config.num_layers=2", "backbone.config.num_attention_heads=1"]
    quoted = ",".join(f"'{one}'" for one in ["objective.distill=0", *tiny])
    found = bench(capsys, "training", f"overrides=[{quoted}]", "batches=[2]", "loop=true")
    assert "distillation off" in found["rows"][0]["group"]
    by = found["by"]
    estimators = ESTIMATORS
    phases = [f"diffcr {name}, {phase}" for name in estimators for phase in ("start", "on target", "whole run")]
    assert set(by) == {"dense", "mod", "hand", "diffcr, frozen", *phases}
    for name in estimators:
        start, learning = by[f"diffcr {name}, start"], by[f"diffcr {name}, on target"]
        whole, frozen = by[f"diffcr {name}, whole run"], by["diffcr, frozen"]
        parts = (start["time_fraction"], learning["time_fraction"], frozen["time_fraction"])
        assert whole["time_fraction"] == pytest.approx(0.15 * parts[0] + 0.25 * parts[1] + 0.6 * parts[2])
        assert whole["status"] == "derived"
        assert {"grouped": "exact", "soft": "one pass", "loop": "one sample at a time"}[name] in learning["note"]
    assert 0.79 <= by["diffcr, frozen"]["macs_fraction"] <= 0.8
    assert all(row["efficiency"] is None for row in found["rows"])


def test_sampling_puts_fewer_steps_beside_each_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "sampling", "guidance_scale=1")
    assert list(found["by"]) == ["dense", "fashion-dit-diffcr-80", "fewer_steps at 0.8"]
    assert found["by"]["fewer_steps at 0.8"]["steps"] == 4
    assert found["by"]["fewer_steps at 0.8"]["macs_fraction"] == pytest.approx(0.8)
    assert 0.5 < found["by"]["fashion-dit-diffcr-80"]["macs_fraction"] < 0.9


def test_the_table_says_how_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "routing", "debug=cpu", "depth=1", "tokens=[16]", "warmup=0"]) == 0
    out = capsys.readouterr().out
    assert "2 timed repeats of every measured row after 1 + 0 calls" in out and "not a figure to report" in out
    assert "block, routed 0.5" in out and "model, dense on 8" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rooting"], "unknown bench 'rooting': did you mean routing"),
        (["routing", "dept=3"], "did you mean depth"),
        (["routing", "routing.dept=3"], "did you mean routing.depth"),
        (["routing", "keep=0.5"], "it takes a list"),
        (["routing", "device=tpu9"], "device='tpu9' is not available"),
        (["methods", "peers=[tomsd]"], "did you mean tomesd"),
        (["training", "experiment=fashion_dense2"], "did you mean fashion_dense"),
        (["training", "overrides=['optimizer.learning=1']"], "unknown config key 'optimizer.learning'"),
        (["sampling", "weights=fashion-dit-diffcr-80"], "is a routed checkpoint"),
        (["sampling", "routed=[fashion-dit]"], "is a dense checkpoint"),
        (["sampling", "weights=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert message in captured.err.splitlines()[-1]
