"""Swaps an object's class in place for a subclass with a mixin in front, and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

STATE = "_diffratio"


class Converted:
    """Base of every mixin that is put in front of a class."""

    _diffratio: Any

    def __reduce__(self) -> tuple[Any, ...]:
        own: Any = type(self)
        kind, base = _converted(own).__bases__
        return _rebuild, (kind, base), self.__dict__


@functools.cache
def _subclass(kind: Any, base: Any) -> type:
    """The subclass of `base` with a mixin in front; it keeps the base's name, which diffusers writes into configs."""
    return type(base.__name__, (kind, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


@functools.cache
def _converted(cls: Any) -> type:
    """The swapped class itself, also where FSDP has put a class of its own in front of it."""
    return next(one for one in cls.__mro__ if Converted in one.__bases__[0].__bases__)


def base_of(cls: type) -> Any:
    """The class that was swapped."""
    return _converted(cls).__bases__[1]


def _rebuild(kind: type, base: type) -> Any:
    cls: Any = _subclass(kind, base)
    return cls.__new__(cls)


def swap(thing: Any, kind: type, state: Any, **extra: Any) -> None:
    """Puts a mixin in front of an object's class; `extra` becomes its attributes `_diffratio_...`."""
    own: Any = type(thing)
    thing.__class__ = _subclass(kind, own)
    thing.__dict__.update({STATE: state, **{f"{STATE}_{key}": value for key, value in extra.items()}})


def unswap(thing: Any) -> None:
    """Undoes `swap`; an object that is not converted stays as it is."""
    if isinstance(thing, Converted):
        thing.__class__ = base_of(type(thing))
        for key in [key for key in thing.__dict__ if key.startswith(STATE)]:
            del thing.__dict__[key]


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments of a method by name (without defaults)."""
    return dict(zip(_parameters(function), args, strict=False)) | kwargs
