"""What a comparison is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffratio.errors import DiffratioError, unknown
from diffratio.evaluation.metrics import METRICS, check_metrics, require_samples
from diffratio.methods.base import check_budget, get_method
from diffratio.plain import MOST, typed, whole
from diffratio.sensitivity import CALIBRATED
from diffratio.surgery import check_on_top

LATENCY_MODES = ("eager", "compiled")
SCHEDULED = ("dato", "block_cache")  # the methods whose steps may come from a file
_PICTURES = 10**6  # more samples than any metric is published with


def method_and_file(given: str) -> tuple[str, str | None]:
    """`dato@search/fashion` is a method and where its step schedule lies; most methods stand alone."""
    name, mark, file = given.partition("@")
    return name, file if mark else None


@dataclass(frozen=True)
class TrainedArm:
    """An arm that was fine-tuned for this comparison.

    Args:
        name: of the arm; `dense_finetuned` is the control.
        budget: fraction of the dense run's MACs that it was trained for.
        seed: of its training; it stands in the records of this seed alone.
        folder: its exported checkpoint; None where it is only planned, not trained yet.
    """

    name: str
    budget: float
    seed: int
    folder: str | None = None


@dataclass(frozen=True)
class CompareSettings:
    """What `configs/compare.yaml` holds, beside data, logger and paths; see there for the meanings."""

    name: str
    weights: str
    methods: tuple[str, ...]
    routed: tuple[str, ...]
    finetuned: str | None
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    n: int
    steps: int
    guidance_scale: float
    batch_size: int
    reference_n: int
    validation_n: int
    latency_batches: tuple[int, ...]
    latency_repeats: int
    block_repeats: int
    device: str
    latency_modes: tuple[str, ...] = ("eager",)
    save_npz: bool = False
    compact: bool = False
    dry_run: bool = False
    train: bool = False
    train_steps: int = 0
    train_experiment: str = ""
    train_overrides: tuple[str, ...] = ()
    train_methods: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    map: str | None = None
    parts: str | None = None
    train_n: int = 2000
    on_routed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for budget in self.budgets:
            check_budget(budget)
        if self.n != 0:  # 0: losses, MACs and times alone
            require_samples("kid_lite0", self.n)
        for metric in check_metrics(self.metrics):
            if metric in METRICS:
                raise DiffratioError(f"metrics: {metric!r} is always measured; metrics=[...] adds optional ones")
            if self.n != 0:
                require_samples(metric, self.n)
        if not self.budgets or not self.seeds:
            raise DiffratioError("compare needs at least one budget and one seed: budgets=[0.8] seeds=[0]")
        for seed in self.seeds:
            whole("seeds: each", seed, 0, 2**31)
        for name, values in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self)):
            if not isinstance(values, tuple) or name == "train_overrides":  # of these the last one counts
                continue
            if twice := [value for value in values if values.count(value) > 1]:
                raise DiffratioError(f"{name}={list(values)}: {twice[0]!r} stands there twice; name each once")
        for name, least in (("n", 0), ("reference_n", 2), ("validation_n", 0), ("train_n", 0), ("train_steps", 0)):
            whole(name, getattr(self, name), least, _PICTURES)
        whole("batch_size", self.batch_size, 1, MOST)
        whole("steps", self.steps, 1, MOST)
        if self.guidance_scale < 0:
            raise DiffratioError(f"guidance_scale={self.guidance_scale:g} must be at least 0; up to 1 there is none")
        for name in ("latency_repeats", "block_repeats"):
            whole(name, getattr(self, name), 0, MOST, "; 0 is off")
        for batch in self.latency_batches:
            whole("latency_batches: each", batch, 1, MOST)
        for mode in self.latency_modes:
            if mode not in LATENCY_MODES:
                raise unknown("latency mode", mode, LATENCY_MODES)
        if self.train and self.train_steps < 1:
            raise DiffratioError(f"train=true needs train_steps of at least 1, got {self.train_steps}")
        for method in self.methods:
            name, _ = _known_file("methods", method)
            if get_method(name).learned and not self.train and method not in CALIBRATED:
                raise DiffratioError(
                    f"methods: {method!r} is learned, so it needs trained weights: train it "
                    f"(diffratio train method={method}), then give its export in routed=[...]; "
                    "or let compare train every such arm alike with train=true"
                )
        for method in self.train_methods:
            get_method(method)
        for method in self.on_routed:
            check_on_top(_known_file("on_routed", method)[0])
        if self.on_routed and not (self.routed or self.train):
            raise DiffratioError(
                f"on_routed={list(self.on_routed)} goes on top of routed checkpoints and there are none: give them in "
                "routed=[...], or train=true"
            )

    @property
    def to_train(self) -> tuple[str, ...]:
        """The methods whose arms are fine-tuned by this comparison."""
        if not self.train:
            return ()
        learned = [method for method in self.methods if get_method(method_and_file(method)[0]).learned]
        return tuple(dict.fromkeys([*learned, *self.train_methods]))

    @property
    def training_free(self) -> tuple[str, ...]:
        """The methods that run on weights as they are."""
        free = [one for one in self.methods if one != "dense" and not get_method(method_and_file(one)[0]).learned]
        return (*free, *self.mapped)

    @property
    def mapped(self) -> tuple[str, ...]:
        """The methods whose schedules a sensitivity map solves, untrained."""
        return () if self.train else tuple(one for one in self.methods if one in CALIBRATED)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> CompareSettings:
        """From plain data; lists become tuples.

        Raises:
            DiffratioError: a missing key, or a value of another type.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in cfg:
                values[field.name] = cfg[field.name]
            elif field.default is dataclasses.MISSING:
                raise DiffratioError(f"compare needs {field.name}, which configs/compare.yaml holds")
        return typed(cls, values)


def _known_file(key: str, given: str) -> tuple[str, str | None]:
    """Name and file of a method, where a file may stand.

    Raises:
        DiffratioError: a file for another method, or an empty one.
    """
    name, file = method_and_file(given)
    if file is not None and (name not in SCHEDULED or not file):
        takers = " and ".join(SCHEDULED)
        raise DiffratioError(
            f"{key}: {given!r}: {takers} alone take a step schedule's file or a search's folder, as {SCHEDULED[0]}@PATH"
        )
    return name, file
