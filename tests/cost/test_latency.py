"""Order, quartiles and limits of the timing; no test asserts how fast anything is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffratio.cost.latency import Timing, interleaved, peak_memory, timing
from diffratio.errors import DiffratioError


def test_every_repeat_calls_all_and_starts_one_further_on() -> None:
    calls: list[str] = []
    timed = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    result = interleaved(timed, repeats=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert list(result) == ["a", "b", "c"]
    assert all(value.repeats == 4 and len(value.times_ms) == 4 for value in result.values())


def test_times_are_milliseconds() -> None:
    result = interleaved({"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}, repeats=3, warmup=0)
    assert result["sleep"].q1_ms >= 20
    assert result["sleep"].median_ms > result["nothing"].median_ms
    assert result["sleep"].relative_to(result["nothing"]) > 1


def test_quartiles_match_numpy() -> None:
    times = [5.0, 1.0, 4.0, 9.0, 2.0, 7.0]
    result = timing(times)
    assert (result.q1_ms, result.median_ms, result.q3_ms) == pytest.approx(tuple(np.percentile(times, [25, 50, 75])))
    assert timing([3.0]) == Timing(3.0, 3.0, 3.0, 1, (3.0,))


def test_relative_time_pairs_repeats() -> None:
    assert timing([1.0, 20.0, 3.0]).relative_to(timing([2.0, 40.0, 6.0])) == 0.5
    with pytest.raises(DiffratioError, match="not taken together"):
        timing([1.0]).relative_to(timing([1.0, 2.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timed": {}}, "nothing to time"),
        ({"repeats": 0}, "repeats >= 1"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        interleaved(**{"timed": {"a": lambda: None}, **arguments})  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused() -> None:
    with pytest.raises(DiffratioError, match="not available"):
        interleaved({"a": lambda: None}, device="cuda")
    with pytest.raises(DiffratioError, match="not available"):
        peak_memory(lambda: None, device="cuda")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_cpu_memory_is_the_growth_over_the_call() -> None:
    large = peak_memory(lambda: torch.ones(16, 1024, 1024))
    small = peak_memory(lambda: None)
    assert large is not None
    assert small is not None
    assert 60 < large < 100  # 64 MiB
    assert small < 8


def test_cpu_memory_that_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffratio.cost.latency._reset_high_water", lambda: False)
    calls: list[int] = []
    assert peak_memory(lambda: calls.append(1)) is None
    assert calls == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.gpu
def test_cuda_times_include_the_kernels() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    result = interleaved({"one": lambda: x @ x, "eight": lambda: [x @ x for _ in range(8)]}, repeats=5, device="cuda")
    assert result["eight"].median_ms > 3 * result["one"].median_ms
    peak = peak_memory(lambda: x @ x, device="cuda")
    assert peak is not None
    assert peak >= 128
