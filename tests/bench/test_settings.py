"""What a bench accepts, and how it refuses the rest."""

from __future__ import annotations

from typing import Any

import pytest

from diffratio.bench.peers import PEERS as TABLE
from diffratio.bench.settings import (
    PEERS,
    BenchSettings,
    MethodsSettings,
    RoutingSettings,
    SamplingSettings,
    TrainingSettings,
    expanded,
)
from diffratio.errors import DiffratioError
from diffratio.plain import typed


def test_keys_of_the_own_section_need_not_name_it() -> None:
    words = ["keep=[0.5]", "repeats=3", "routing.depth=1", "debug=cpu", "+x=1"]
    assert expanded("routing", words) == ["routing.keep=[0.5]", "repeats=3", "routing.depth=1", "debug=cpu", "+x=1"]
    with pytest.raises(DiffratioError, match="unknown key of bench routing 'dept': did you mean depth"):
        expanded("routing", ["dept=3"])
    with pytest.raises(DiffratioError, match="unknown key of bench sampling 'width'"):
        expanded("sampling", ["width=64"])
    with pytest.raises(DiffratioError, match="unknown bench 'route': did you mean routing"):
        expanded("route", [])


def test_lists_become_tuples_and_keep_ratios_bins() -> None:
    own = typed(RoutingSettings, {"keep": [0.3, 0.7], "tokens": [64]}, "routing")
    assert own.tokens == (64,) and own.bins == (3, 7) and own.width == RoutingSettings().width
    assert typed(BenchSettings, {"threads": 2}).threads == 2


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (BenchSettings, {"repeats": 0}, "repeats must be at least 1, got 0"),
        (BenchSettings, {"repeats": True}, "repeats=True: it takes an integer"),
        (BenchSettings, {"threads": 0}, "threads must be at least 1, got 0"),
        (BenchSettings, {"dtype": "float8"}, "did you mean float"),
        (BenchSettings, {"out": "x.txt"}, "ends in .json"),
        (BenchSettings, {"repeat": 3}, "did you mean repeats"),
        (RoutingSettings, {"keep": [1.0]}, "tenths from 0.1 to 0.9"),
        (RoutingSettings, {"keep": [0.25]}, "tenths from 0.1 to 0.9"),
        (RoutingSettings, {"keep": 0.5}, "it takes a list of numbers, keep=[...]"),
        (RoutingSettings, {"keep": []}, "keep=[] is empty"),
        (RoutingSettings, {"tokens": [1000]}, "tokens=1000 is no square"),
        (RoutingSettings, {"width": 70}, "multiple of 8"),
        (RoutingSettings, {"width": 10**9}, "width must be at most 65,536"),
        (RoutingSettings, {"tokens": [10**10]}, "tokens must be at most 65,536"),
        (RoutingSettings, {"modes": ["jit"]}, "unknown mode 'jit'"),
        (TrainingSettings, {"spread": 2.0}, "outside [0, 0.9]"),
        (TrainingSettings, {"loop": 1}, "loop=1: it takes true or false"),
        (TrainingSettings, {"batches": [0]}, "batches must be at least 1, got 0"),
        (MethodsSettings, {"budget": 1.5}, "outside (0, 1]"),
        (MethodsSettings, {"peers": ["tomsd"]}, "did you mean tomesd"),
        (SamplingSettings, {"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_one_line(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError) as caught:
        typed(cls, values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_names_of_the_peers_are_those_of_the_table() -> None:
    assert tuple(TABLE) == PEERS
