"""Settings from plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from diffratio.errors import DiffratioError
from diffratio.plain import switches, typed, whole


@dataclass(frozen=True)
class Some:
    """One of each kind."""

    count: int
    share: float = 0.5
    name: str = ""
    on: bool = False
    folder: str | None = None
    limit: float | None = None
    words: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)


def test_each_value_becomes_what_its_field_says() -> None:
    found = typed(Some, {"count": 2, "share": 1, "words": ["a", "b"], "pair": [0, 1], "folder": None, "limit": 3})
    assert found == Some(2, 1.0, words=("a", "b"), limit=3.0)
    assert [type(one) for one in (found.share, found.limit, *found.pair)] == [float] * 4
    assert typed(Some, {"count": 2, "folder": "x"}) == Some(2, folder="x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "2"}, "some.count='2': it takes an integer"),
        ({"count": True}, "some.count=True: it takes an integer"),
        ({"count": 2.0}, "some.count=2.0: it takes an integer"),
        ({"count": None}, "some.count=None: it takes an integer"),
        ({"share": float("nan")}, "some.share=nan: it takes a finite number"),
        ({"share": 10**400}, "it takes a finite number"),
        ({"share": False}, "some.share=False: it takes a finite number"),
        ({"name": 3}, "some.name=3: it takes text"),
        ({"on": 1}, "some.on=1: it takes true or false"),
        ({"folder": 3}, "some.folder=3: it takes text or null"),
        ({"limit": "x"}, "some.limit='x': it takes a finite number or null"),
        ({"words": "a"}, "some.words='a': it takes a list of texts, words=[...]"),
        ({"words": ["a", 1]}, "some.words=['a', 1]: it takes a list of texts"),
        ({"pair": [1.0]}, "some.pair=[1.0]: it takes a list of 2 numbers"),
        ({"cuont": 1}, "unknown key of some 'cuont': did you mean count"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError) as caught:
        typed(Some, values, "some")
    assert message in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [0, 6, 2.0, "3", None, True])
def test_numbers_of_things_are_bounded(value: Any) -> None:
    whole("steps", 5, 1, 5)
    with pytest.raises(DiffratioError, match="steps must be (at least 1|at most 5|an integer), got .*; none is off"):
        whole("steps", value, 1, 5, "; none is off")


def test_switches_are_on_or_off() -> None:
    switches({"a": True}, "some", ["a", "missing"])
    with pytest.raises(DiffratioError, match="some.a='yes': it takes true or false"):
        switches({"a": "yes"}, "some", ["a"])
