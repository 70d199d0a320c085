"""Arms whose cost depends on the input: priced by sampling, and counted on the very samples of a record."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparing import DATA, light, make_checkpoints, settings

from diffratio.evaluation.compare import compare_from_config
from diffratio.evaluation.records import read_records


def test_a_cache_is_priced_on_samples_and_its_records_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch, tmp_path, probes=True)
    name, budgets = "external_cache:pyramid_attention_broadcast", [0.91, 0.1]
    config = settings(make_checkpoints(tmp_path), tmp_path / "out", methods=[name], budgets=budgets, steps=8)
    compare_from_config(config | {"validation_n": 0}, DATA.held_out)
    records = {(one.arm.name, one.budget): one for one in read_records(tmp_path / "out")}
    dense, cached, missed = (records[key] for key in (("dense", 1.0), (name, 0.91), (name, 0.1)))
    assert "measured" not in dense.cost
    assert cached.status == "ok" and cached.flags == () and cached.message == ""
    assert cached.cost["measured"] is True and cached.cost["cache"]["samples"] == cached.n == 4
    assert 0.9 <= cached.cost["fraction"] <= 0.91  # this cache does not look at its input: all samples cost the same
    assert 0 < cached.cost["cache"]["hit_rate"] < 1
    assert missed.status == "unreachable" and "on this run it costs" in missed.message
