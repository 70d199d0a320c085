"""Remembers what was computed from a tensor's content: all arms of a comparison share one reference set."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_SLOTS = 16
_results: OrderedDict[Hashable, object] = OrderedDict()


def remembered(what: Hashable, tensors: tuple[Tensor, ...], compute: Callable[[], T]) -> T:
    """The result of `compute`, from memory where it ran on equal tensors before.

    Keyed by content, not by identity: a tensor changed in place, or another one at the same address, is a new key.
    Hashing a thousand features takes milliseconds, what is remembered takes up to seconds.

    Args:
        what: names the computation and its settings.
        tensors: all tensors that the result depends on.
        compute: the computation; its result must not be changed by who gets it.

    Returns:
        The result; the last 16 are kept.
    """
    key = (what, *(_digest(tensor) for tensor in tensors))
    if key in _results:
        _results.move_to_end(key)
    else:
        _results[key] = compute()
        while len(_results) > _SLOTS:
            _results.popitem(last=False)
    found: T = _results[key]  # type: ignore[assignment]
    return found


def forget() -> None:
    """Empties the memory."""
    _results.clear()


def _digest(tensor: Tensor) -> tuple[str, str, tuple[int, ...], bytes]:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.device), str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(content.numpy().data).digest()
