"""What a process holds, counted so that a leak of one small tensor a cycle shows."""

from __future__ import annotations

import gc
import types
import weakref
from dataclasses import dataclass

import psutil
import torch

_APART = (weakref.ref, types.BuiltinFunctionType, torch.UntypedStorage)


@dataclass(frozen=True)
class Footprint:
    """What stands in memory after a collection.

    Resident memory alone is too coarse with tiny models: two per cent of it are several megabytes, of which a hundred
    leaked transformers of these tests are a part. Tensors and objects are counted one by one beside it.

    Args:
        resident: bytes of the process.
        tensors: live tensors that Python reaches.
        stored: bytes of their storages, each counted once.
        objects: containers that Python's collector tracks, without weak references and their callbacks (abstract
            classes cache some dozens, at no fixed time) and without storages, which this count itself makes.
        files: open file descriptors, sockets and pipes included.
        threads: of the process.
        children: processes that it has started and that have not ended, theirs included.
    """

    resident: int
    tensors: int
    stored: int
    objects: int
    files: int
    threads: int
    children: int


def footprint() -> Footprint:
    """Counts, after all garbage is collected."""
    gc.collect()
    objects = [one for one in gc.get_objects() if type(one) not in _APART]
    kinds = (torch.Tensor, torch.nn.Parameter)  # a compiler's fake ones have no storage
    tensors = [one for one in objects if type(one) in kinds]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    process = psutil.Process()
    return Footprint(
        resident=process.memory_info().rss,
        tensors=len(tensors),
        stored=sum(storages.values()),
        objects=len(objects) - len(tensors),
        files=process.num_fds(),
        threads=process.num_threads(),
        children=len(process.children(recursive=True)),
    )


def assert_steady(before: Footprint, after: Footprint, share: float = 0.02, objects: int = 0) -> None:
    """The same tensors, files, threads and processes; resident memory within a share.

    Args:
        before: after a few cycles, when caches are filled.
        after: after many more.
        share: of the resident memory that may be added.
        objects: that may be added; a leak of one a cycle is more.
    """
    for name in ("tensors", "stored", "files", "threads", "children"):
        assert getattr(after, name) <= getattr(before, name), (name, before, after)
    assert after.objects <= before.objects + objects, (before, after)
    assert after.resident <= before.resident * (1 + share), (before, after)
