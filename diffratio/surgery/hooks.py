"""Hooks of accelerate and diffusers on modules whose class is swapped: offloading, casting, dispatch."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from diffratio.errors import DiffratioError

# Both libraries set an instance's `forward`, which hides its class's, and keep the one that was there: accelerate as
# `_old_forward`, diffusers in the references of its registry.
_REGISTRY, _ACCELERATE, _GROUPS = "_diffusers_hook", "_hf_hook", "group_offloading"


def carry_forward_(module: Any, before: type) -> None:
    """After a swap, makes hooks that wrapped the former class's forward wrap the present one's.

    Args:
        module: the swapped object.
        before: its class until now.
    """
    for place, key in _kept(module, before):
        place[key] = MethodType(type(module).forward, module)


def check_hooks(transformer: nn.Module, modules: Iterable[nn.Module], brings_parameters: bool) -> None:
    """Checks that methods can go into a transformer as it stands.

    Args:
        transformer: before anything is swapped.
        modules: whose class is to be swapped.
        brings_parameters: whether routers are registered in it.

    Raises:
        DiffratioError: a module has a forward of its own that a swap would not reach, or new parameters would not
            follow those that hooks move.
    """
    for module in modules:
        if "forward" in vars(module) and not _kept(module, type(module)):
            raise DiffratioError(
                f"{type(module).__name__} has a forward of its own, set by something that is neither accelerate nor "
                "diffusers, and would pass by the method: diffratio.apply_ first, or load the routed checkpoint first"
            )
    if not brings_parameters:
        return
    for name, module in transformer.named_modules():
        registry = vars(module).get(_REGISTRY)
        grouped = registry is not None and registry.get_hook(_GROUPS) is not None
        if grouped or (name and _ACCELERATE in vars(module)):
            raise DiffratioError(
                f"{name or type(transformer).__name__} is offloaded or dispatched by hooks, which would leave new "
                "routers behind: diffratio.apply_ first, or load the routed checkpoint first, then offload"
            )


def _kept(module: Any, cls: Any) -> list[tuple[dict[str, Any], str]]:
    """Where an object's hooks keep the bound forward of a class."""
    forward = getattr(cls, "forward", None)
    places = [vars(module), *map(vars, getattr(vars(module).get(_REGISTRY), "_fn_refs", ()))]
    return [
        (place, key)
        for place in places
        for key, value in place.items()
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is forward
    ]
