"""Settings from plain data (YAML, words of a command): each value of the kind that its field says, or one line why not.

Imports nothing heavy: every verb reads its settings with it before it loads anything.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, TypeVar

from diffratio.errors import DiffratioError, shortened, unknown

T = TypeVar("T")
MOST = 2**16  # of samples together, pixels of a side; beyond it stands a slip of the hand
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def typed(cls: type[T], values: Mapping[str, Any], section: str = "", what: str = "") -> T:
    """A settings dataclass from plain data; lists become tuples, integers floats where these are asked for.

    Args:
        cls: dataclass; missing keys take its defaults.
        values: plain data by field.
        section: prefix of the keys in messages.
        what: whose keys they are, in messages; the section's where it is empty.

    Raises:
        DiffratioError: an unknown key, a value of another type, or a number that is not finite.
    """
    hints, chosen = typing.get_type_hints(cls), {}
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in names:
            raise unknown(f"key of {what or section or 'the settings'}", key, names)
        name = f"{section}.{key}" if section else key
        if not _fits(value, hints[key]):
            raise DiffratioError(f"{name}={shortened(value)}: it takes {_wanted(hints[key], key)}")
        chosen[key] = _as(value, hints[key])
    return cls(**chosen)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        members = typing.get_args(hint)
        one_each = members[1:] != (...,) and isinstance(value, list | tuple) and len(members) != len(value)
        return isinstance(value, list | tuple) and not one_each and all(_fits(one, members[0]) for one in value)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float) and _finite(value)
    return isinstance(value, hint)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _as(value: Any, hint: Any) -> Any:
    if isinstance(value, list | tuple):
        (members,) = [one for one in (hint, *typing.get_args(hint)) if typing.get_origin(one) is tuple][:1]
        return tuple(_as(one, typing.get_args(members)[0]) for one in value)
    wants_float = hint is float or (isinstance(hint, types.UnionType) and float in typing.get_args(hint))
    return float(value) if wants_float and isinstance(value, int) and not isinstance(value, bool) else value


def _wanted(hint: Any, key: str) -> str:
    if typing.get_origin(hint) is tuple:
        members = typing.get_args(hint)
        of = {int: "integers", float: "numbers", str: "texts"}.get(members[0], "values")
        return f"a list of {'' if members[1:] == (...,) else f'{len(members)} '}{of}, {key}=[...]"
    if isinstance(hint, types.UnionType):
        return " or ".join(_wanted(one, key) for one in typing.get_args(hint))
    return "a finite number" if hint is float else _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def whole(name: str, value: Any, least: int, most: int = 2**62, more: str = "") -> None:
    """Checks a number of things.

    Args:
        name: of the value in messages.
        value: an integer of any library.
        least: smallest allowed.
        most: largest allowed.
        more: what the messages end with, such as a way out.

    Raises:
        DiffratioError: it is no integer, or outside.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DiffratioError(f"{name} must be an integer, got {shortened(value)}{more}")
    number = int(value)
    if number < least:
        raise DiffratioError(f"{name} must be at least {least}, got {shortened(value)}{more}")
    if number > most:
        raise DiffratioError(f"{name} must be at most {most:,}, got {shortened(value)}{more}")


def switches(settings: Mapping[str, Any], section: str, keys: Iterable[str]) -> None:
    """Checks keys of a section that are on or off.

    Raises:
        DiffratioError: one that is neither.
    """
    for key in keys:
        if not isinstance(settings.get(key, False), bool):
            name = f"{section}.{key}" if section else key
            raise DiffratioError(f"{name}={shortened(settings[key])}: it takes {_KINDS[bool]}")
