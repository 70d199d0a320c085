"""Swaps an object's class in place for a subclass with a mixin in front, and back."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

from diffratio.surgery.hooks import carry_forward_

STATE = "_diffratio"
HOOKED = ("forward", "_diffusers_hook")  # what diffusers' hooks put into a module


class Converted:
    """Base of every mixin that is put in front of a class.

    Attributes:
        signed: methods that show the signature of the base class's.
    """

    signed: ClassVar[tuple[str, ...]] = ()
    _diffratio: Any

    def __reduce__(self) -> tuple[Any, ...]:
        own: Any = type(self)
        kind, base = _converted(own).__bases__
        state = self.__dict__
        if STATE in state and not all(method.static for method in getattr(state[STATE], "methods", ())):
            # the hooks of another library's cache would run the original's weights; the copy gets its own
            state = {key: value for key, value in state.items() if key not in HOOKED}
        return _rebuild, (kind, base), state


@functools.cache
def _subclass(kind: Any, base: Any) -> type:
    """The subclass of `base` with a mixin in front; it keeps the base's name, which diffusers writes into configs."""
    signed = {name: _signed(vars(kind)[name], getattr(base, name)) for name in kind.signed}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (kind, base), names | signed)


def _signed(function: Any, like: Callable[..., Any]) -> Any:
    """The same function with another one's signature."""
    name, defaults, cells = function.__name__, function.__defaults__, function.__closure__
    twin: Any = types.FunctionType(function.__code__, function.__globals__, name, defaults, cells)
    twin.__doc__, twin.__signature__ = function.__doc__, inspect.signature(like)
    return twin


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
    carry_forward_(thing, own)
    thing.__dict__.update({STATE: state, **{f"{STATE}_{key}": value for key, value in extra.items()}})


def unswap(thing: Any) -> None:
    """Undoes `swap`; an object that is not converted stays as it is."""
    if isinstance(thing, Converted):
        own = type(thing)
        thing.__class__ = base_of(own)
        carry_forward_(thing, own)
        for key in [key for key in thing.__dict__ if key.startswith(STATE)]:
            del thing.__dict__[key]


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments of a method by name (without defaults)."""
    return dict(zip(_parameters(function), args, strict=False)) | kwargs
