"""Typed settings of the benches: what `configs/bench.yaml` holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffratio.errors import DiffratioError, unknown
from diffratio.plain import MOST, whole

MODES = ("eager", "compiled")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PEERS = (
    "tomesd",
    "cache_dit",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "faster_cache",
    "taylorseer_cache",
    "sea_cache",
)


@dataclass(frozen=True)
class BenchSettings:
    """What all benches share.

    Args:
        repeats: interleaved timed calls of each variant; 10 and more for a figure that is reported.
        warmup: calls of each before that.
        device: `auto`, `cpu` or a CUDA device.
        dtype: of the models of `routing`, `methods` and `table`.
        threads: CPU threads; None leaves torch's choice.
        seed: of weights, noise and draws.
        out: file for the document (of `table` the cost table itself), or None.
    """

    repeats: int = 10
    warmup: int = 2
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, repeats=self.repeats)
        _at_least(0, warmup=self.warmup)
        whole("seed", self.seed, 0, 2**31)
        if self.threads is not None:
            _at_least(1, threads=self.threads)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.out is not None and not self.out.endswith(".json"):
            raise DiffratioError(f"out={self.out!r}: the document is JSON, give a name that ends in .json")


@dataclass(frozen=True)
class RoutingSettings:
    """`bench routing`: widths d, numbers of tokens N (squares) and keep ratios (whole tenths below 1)."""

    width: int = 1152
    depth: int = 4
    tokens: tuple[int, ...] = (256, 1024)
    keep: tuple[float, ...] = (0.3, 0.5, 0.8)
    batches: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = ("eager",)

    def __post_init__(self) -> None:
        _model(self.width, self.depth, self.tokens)
        _some(keep=self.keep, batches=self.batches, modes=self.modes, tokens=self.tokens)
        _at_least(1, **{"batches": min(self.batches)})
        _modes(self.modes)
        for keep in self.keep:
            if not 0 < keep < 1 or abs(keep * 10 - round(keep * 10)) > 1e-9:
                raise DiffratioError(f"keep={keep!r}: it takes tenths from 0.1 to 0.9, such as keep=[0.3,0.5,0.8]")

    @property
    def bins(self) -> tuple[int, ...]:
        """The keep ratios in tenths."""
        return tuple(round(10 * keep) for keep in self.keep)


@dataclass(frozen=True)
class TrainingSettings:
    """`bench training`: an experiment whose method is swapped, further overrides, and the spread of the ratios.

    Args:
        experiment: its data, model and budget.
        overrides: further ones of it.
        batches: batch sizes.
        spread: largest distance of a ratio from their mean.
        loop: whether the published way, one sample at a time, is timed too; it is several times slower.
        profile: whether the shares of a step's time by kind of work are told, too.
    """

    experiment: str = "fashion_diffcr"
    overrides: tuple[str, ...] = ("objective.distill=0",)
    batches: tuple[int, ...] = (48,)
    spread: float = 0.2
    loop: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        _some(batches=self.batches)
        _at_least(1, batches=min(self.batches))
        if not 0 <= self.spread <= 0.9:
            raise DiffratioError(f"spread={self.spread!r} is outside [0, 0.9]; it is a distance between keep ratios")


@dataclass(frozen=True)
class MethodsSettings:
    """`bench methods`: the budget, the model and run that all methods share, and the peers beside them."""

    budget: float = 0.8
    width: int = 1152
    depth: int = 2
    tokens: int = 1024
    steps: int = 5
    guidance_scale: float = 2.0
    batches: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = ("eager",)
    peers: tuple[str, ...] = PEERS

    def __post_init__(self) -> None:
        from diffratio.methods.base import check_budget

        check_budget(self.budget)
        for peer in self.peers:
            if peer not in PEERS:
                raise unknown("peer", peer, PEERS)
        _model(self.width, self.depth, (self.tokens,))
        _some(batches=self.batches, modes=self.modes)
        _at_least(1, batches=min(self.batches), steps=self.steps)
        _modes(self.modes)


@dataclass(frozen=True)
class SamplingSettings:
    """`bench sampling`: a dense checkpoint, routed ones, and the sampling run."""

    weights: str = "fashion-dit"
    routed: tuple[str, ...] = ("fashion-dit-diffcr-80",)
    steps: int = 20
    guidance_scale: float = 2.0
    batches: tuple[int, ...] = (1, 8)
    modes: tuple[str, ...] = ("eager",)

    def __post_init__(self) -> None:
        _some(batches=self.batches, modes=self.modes)
        _at_least(1, batches=min(self.batches), steps=self.steps)
        _modes(self.modes)


@dataclass(frozen=True)
class TableSettings:
    """`bench table`: a dense model, by checkpoint or by experiment, and how its blocks are called.

    Args:
        weights: checkpoint.
        experiment: whose backbone is timed instead of `weights`; weights do not matter for speed.
        overrides: of the experiment.
        batch: samples in a forward; the two guidance halves of one picture are 2.
        alignment: computed tokens are rounded up to a multiple of this.
    """

    weights: str = "fashion-dit"
    experiment: str | None = None
    overrides: tuple[str, ...] = ()
    batch: int = 2
    alignment: int = 1

    def __post_init__(self) -> None:
        _at_least(1, batch=self.batch, alignment=self.alignment)
        if self.overrides and self.experiment is None:
            raise DiffratioError("overrides of bench table are of an experiment; give experiment=NAME as well")


SECTIONS: dict[str, type] = {
    "routing": RoutingSettings,
    "training": TrainingSettings,
    "methods": MethodsSettings,
    "sampling": SamplingSettings,
    "table": TableSettings,
}


def check_kind(kind: str) -> str:
    """Raises DiffratioError for a bench that there is not."""
    if kind not in SECTIONS:
        raise unknown("bench", kind, SECTIONS)
    return kind


def expanded(kind: str, overrides: Sequence[str]) -> list[str]:
    """Overrides of a bench, where keys of its own section need not name it.

    Example:
        >>> expanded("routing", ["keep=[0.5]", "repeats=20"])
        ['routing.keep=[0.5]', 'repeats=20']
    """
    own = {field.name for field in dataclasses.fields(SECTIONS[check_kind(kind)])}
    shared = {field.name for field in dataclasses.fields(BenchSettings)}
    found = []
    for one in overrides:
        key = one.split("=", 1)[0]
        if key.isidentifier() and key not in own | shared | set(SECTIONS) | {"debug", "name"}:
            raise unknown(f"key of bench {kind}", key, own | shared)
        found.append(f"{kind}.{one}" if key in own else one)
    return found


def _at_least(lowest: int, **values: int) -> None:
    for name, value in values.items():
        whole(name, value, lowest, MOST)


def _some(**lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if not values:
            raise DiffratioError(f"{name}=[] is empty; give at least one")


def _modes(modes: Sequence[str]) -> None:
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)


def _model(width: int, depth: int, tokens: Sequence[int]) -> None:
    _at_least(1, depth=depth, width=width)
    if width < 8 or width % 8:
        raise DiffratioError(f"width={width!r} must be a multiple of 8")
    for count in tokens:
        _at_least(1, tokens=count)
        if count < 4 or math.isqrt(count) ** 2 != count:
            raise DiffratioError(
                f"tokens={count!r} is no square of at least 4; DiT takes square token grids, such as 1024"
            )
