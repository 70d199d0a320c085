"""Where the time of a call goes, by kind of work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

KINDS: dict[str, tuple[str, ...]] = {  # in this order: the first whose part occurs in an operator's name
    "attention": ("attention", "sdp", "flash", "softmax"),
    "matmul": ("mm", "linear", "convolution", "mkldnn", "bmm"),
    "routing": ("topk", "sort", "gather", "scatter", "index", "take", "searchsorted"),
    "norm": ("layer_norm", "rms_norm", "native_norm"),
    "activation": ("gelu", "silu", "sigmoid", "tanh"),
    "copies": ("copy", "cat", "contiguous", "clone", "stack", "fill", "zero", "empty", "pad"),
}
OPTIMIZER, OTHER = "optimizer", "other"


def profiled(call: Callable[[], object], device: str, calls: int = 2) -> dict[str, float]:
    """Shares of the time of a call by kind of work, largest first.

    Args:
        call: called once before, so that nothing is made for the first time.
        device: where it runs; on a GPU the time of its kernels counts.
        calls: that are looked at.

    Returns:
        Kind -> share; together 1. What Python and launching cost on a processor is in `other`.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own lines are no part of the table
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    call()
    with profile(activities=activities) as found:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    for event in found.events() or []:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event)
        times[kind] = times.get(kind, 0.0) + float(own)
    total = sum(times.values()) or 1.0
    return {kind: time / total for kind, time in sorted(times.items(), key=lambda one: -one[1]) if time}


def kind_of(event: Any) -> str:
    """The kind of an operator; all that the optimizer calls is the optimizer's."""
    outer = event
    while outer is not None:
        if str(outer.name).startswith("Optimizer.step"):
            return OPTIMIZER
        outer = outer.cpu_parent
    name = str(event.name).lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def in_words(shares: Mapping[str, float]) -> str:
    """Shares as a line, those above half a percent."""
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items() if share > 0.005)
