"""What hostile input looks like: values, mutations of JSON and of bytes, and how a verb must answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffratio.cli import main

MOST_PROBLEMS = 2200  # characters of a line


def nested(depth: int) -> Any:
    """Lists inside each other."""
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    10**7,
    10**9,
    2**63,
    -(2**63) - 1,
    10**30,
    10**4000,
    0.0,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "0",
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/stdin",
    "~nobody-of-that-name/x",
    "a\x00b",
    "\x1b[2J\x07",
    "line\nline",
    "\ud800",
    "é" * 300,
    "a" * 5000,
    [],
    [[]],
    [1, "x", None],
    [None] * 50,
    [0] * 5000,
    {},
    {"a": {"b": 1}},
    {"name": "diffcr"},
    nested(100),
]
values = st.sampled_from(NASTY)
words = st.sampled_from([str(value) for value in NASTY if not isinstance(value, int) or abs(value) < 10**100])


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every value of a document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(one for key, value in inner for one in places(value, (*at, key)))]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> str:
    """Text of a JSON document of which one or two values were replaced, removed, renamed or moved."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        ways = [way for way in places(found) if way]
        if not ways:
            break
        way = draw(st.sampled_from(ways))
        owner = found
        for key in way[:-1]:
            owner = owner[key]
        what = draw(st.sampled_from(["value", "value", "value", "remove", "twice", "own"]))
        if what == "value":
            owner[way[-1]] = copy.deepcopy(draw(values))
        elif what == "remove":
            del owner[way[-1]]
        elif what == "twice" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[way[-1]]))
        elif what == "own":
            owner[way[-1]] = [owner[way[-1]]]
        elif isinstance(owner, dict):
            owner[f"{way[-1]}x"] = owner.pop(way[-1])
    text = _dumped(found)
    how = draw(st.sampled_from(["whole"] * 12 + ["cut", "twin", "tail", "empty"]))
    return {
        "whole": text,
        "cut": text[: len(text) // 2],
        "twin": '{"format": 1, "format": 2}',
        "tail": text + "]",
        "empty": "",
    }[how]


def _dumped(document: Any) -> str:
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(document)
    finally:
        sys.set_int_max_str_digits(before)


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with flipped bits, cut short, doubled, or replaced by others."""
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "twice", "other", "header"]))
    if how == "flip":
        found = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, min(len(raw), draw(st.sampled_from([16, 600, 1 << 30]))) - 1))
            found[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(found)
    if how == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if how == "twice":
        return raw + raw
    if how == "header":  # the length that a safetensors file begins with
        return draw(st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])).to_bytes(8, "little") + raw[8:]
    return draw(st.sampled_from([b"", b"\x00" * 64, b"PK\x03\x04" + b"x" * 64, b"\x89PNG\r\n\x1a\n", b"{}"]))


def answered(capsys: pytest.CaptureFixture[str], argv: list[str], codes: tuple[int, ...] = (0, 2)) -> int:
    """Runs the command line: one of the codes, and one printable line where it says no."""
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    assert code in codes, (code, argv, captured.err)
    if code == 2:
        lines = captured.err.splitlines()
        said = [line for line in lines if line.startswith("diffratio: ")]
        assert len(said) == 1 and lines == said, (argv, captured.err)
        assert said[0].isprintable() and len(said[0]) < MOST_PROBLEMS and captured.out == "", (argv, said)
    return code


def fuzzed(few: int, many: int, *given_args: Any) -> Callable[[Callable[..., None]], tuple[Any, Any]]:
    """A test of a few examples, and the same of many that is marked slow."""

    def both(body: Callable[..., None]) -> tuple[Any, Any]:
        quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

        def of(examples: int) -> Any:
            return settings(max_examples=examples, suppress_health_check=quiet)(given(*given_args)(body))

        return of(few), pytest.mark.slow(of(many))

    return both
