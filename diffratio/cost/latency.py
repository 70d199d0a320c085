"""Wall-clock time and memory of callables: interleaved repeats, so that drift of the machine hits all alike."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffratio.errors import DiffratioError, unknown

MIB = 1024 * 1024


@dataclass(frozen=True)
class Timing:
    """Time of one callable over its repeats, in milliseconds.

    Args:
        median_ms: median.
        q1_ms: lower quartile.
        q3_ms: upper quartile.
        repeats: timed calls.
        times_ms: every timed call, in the order of the repeats.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    repeats: int
    times_ms: tuple[float, ...] = field(default=(), repr=False)

    def relative_to(self, other: Timing) -> float:
        """Median over repeats of this time / the other's in the same repeat; steadier than the quotient of medians.

        Raises:
            DiffratioError: the two were not timed together.
        """
        if not self.times_ms or len(self.times_ms) != len(other.times_ms):
            raise DiffratioError(
                f"timings of {len(self.times_ms)} and {len(other.times_ms)} repeats were not taken together; "
                "time both in one call of interleaved"
            )
        return statistics.median(a / b for a, b in zip(self.times_ms, other.times_ms, strict=True))


def interleaved(
    timed: Mapping[str, Callable[[], object]],
    repeats: int = 10,
    warmup: int = 2,
    device: str | torch.device = "cpu",
) -> dict[str, Timing]:
    """Times callables against each other: every repeat calls all of them once, each repeat starting one further on.

    On CUDA a call is bracketed by events on an idle device, so launch gaps count and queued work does not.

    Args:
        timed: what to time, by name; each call does the same work.
        repeats: timed calls of each, at least 1 (10 for a figure that is reported).
        warmup: calls of each before that, not timed.
        device: `cpu` or a CUDA device, where the work runs.

    Returns:
        Timings by name, in the order of `timed`.

    Raises:
        DiffratioError: nothing to time, fewer than one repeat, or a device that cannot be timed.

    Example:
        >>> sorted(interleaved({"a": lambda: sum(range(9)), "b": lambda: None}, repeats=3))
        ['a', 'b']
    """
    if not timed:
        raise DiffratioError("nothing to time: pass at least one callable")
    if repeats < 1 or warmup < 0:
        raise DiffratioError(f"timing needs repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    clock = _clock(device)
    names = list(timed)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            timed[name]()
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(timed[name]))
    return {name: timing(times[name]) for name in names}


def timing(times_ms: list[float]) -> Timing:
    """Median and quartiles (linear interpolation) of a list of milliseconds."""
    if len(times_ms) == 1:
        return Timing(times_ms[0], times_ms[0], times_ms[0], 1, tuple(times_ms))
    q1, median, q3 = statistics.quantiles(times_ms, n=4, method="inclusive")
    return Timing(median, q1, q3, len(times_ms), tuple(times_ms))


def peak_memory(fn: Callable[[], object], device: str | torch.device = "cpu") -> float | None:
    """Peak memory of one call, in MiB.

    The two kinds of figure do not compare: CUDA gives the allocator's peak, with weights and all else that is already
    there; the CPU gives the growth of the resident set over the call (memory that the process already held and reuses
    does not show, so it is a lower bound).

    Args:
        fn: what to run; called once.
        device: `cpu` or a CUDA device.

    Returns:
        MiB, or None on a CPU whose kernel does not let a process reset its high-water mark (only Linux does).

    Raises:
        DiffratioError: a device that cannot be measured.
    """
    device = _checked(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MIB
    _give_back()
    measurable = _reset_high_water()
    before = _status_kib("VmRSS") if measurable else None
    fn()
    after = _status_kib("VmHWM") if measurable else None
    return None if before is None or after is None else max(0, after - before) / 1024


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Sets the number of CPU threads (None leaves it), and puts it back."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor and how many threads torch uses on it."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # only Linux has it
    return f"{name}, {torch.get_num_threads()} threads"


def _clock(device: str | torch.device) -> Callable[[Callable[[], object]], float]:
    device = _checked(device)

    def on_cpu(fn: Callable[[], object]) -> float:
        start = time.perf_counter()
        fn()
        return (time.perf_counter() - start) * 1e3

    def on_cuda(fn: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            fn()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

    return on_cuda if device.type == "cuda" else on_cpu


def _checked(device: str | torch.device) -> torch.device:
    try:
        checked = torch.device(device)
    except RuntimeError:
        raise unknown("device", device, ("cpu", "cuda")) from None
    if checked.type not in ("cpu", "cuda"):
        raise unknown("device", device, ("cpu", "cuda"))
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise DiffratioError(f"device {str(checked)!r} is not available on this machine; use cpu")
    return checked


def _give_back() -> None:
    """Returns freed memory to the system: what the allocator kept from an earlier call would hide the next one's."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
            handle.write("5")
    except OSError:
        return False
    return True


def _status_kib(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as handle:
            for line in handle:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1])
    except OSError:
        return None
    return None
