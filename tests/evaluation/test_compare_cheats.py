"""Three methods that cheat, and the flags that they get."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from comparing import DATA, light, make_checkpoints, settings
from torch import Tensor

from diffratio.catalog import METHODS
from diffratio.cost.count import count_macs
from diffratio.cost.macs import Cost, Description
from diffratio.cost.run import SamplingRun
from diffratio.evaluation.compare import compare_from_config
from diffratio.evaluation.records import Record, read_records
from diffratio.methods import base
from diffratio.methods.base import BlockCall, Method, MethodConfig, register


@dataclass(frozen=True)
class Liar(MethodConfig):
    """Says what it was asked to say."""

    budget: float = 1.0


class Lying(Method):
    """Claims its budget whatever it computes."""

    def macs(self, run: SamplingRun, linear_only: bool = False) -> Cost:
        cost = super().macs(run, linear_only)
        return replace(cost, total=int(self.config.budget * cost.dense))

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> Any:
        return cls.config_class(budget)  # type: ignore[call-arg]


class IdleConfig(Liar):
    pass


class FrozenConfig(Liar):
    pass


class RandomConfig(Liar):
    pass


class Idle(Lying):
    """Computes everything."""

    name, config_class = "idle", IdleConfig


class Frozen(Lying):
    """Predicts the same everywhere, far enough to drive every pixel into the clamp: white noise gives black."""

    name, config_class = "frozen", FrozenConfig

    def end_step(self, output: Tensor, ctx: Any) -> None:
        output.fill_(50.0)


class Random(Lying):
    """Adds noise that no seed decides."""

    name, config_class = "random", RandomConfig
    draws = itertools.count()

    def run_block(self, layer: int, call: BlockCall, ctx: Any) -> Tensor:
        x = call()
        generator = torch.Generator().manual_seed(next(self.draws))
        return x + torch.randn(x.shape, generator=generator)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Record]]:
    out = tmp_path_factory.mktemp("cheats")
    checkpoints = make_checkpoints(out / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        light(patch, out, probes=True)
        for cls in (Idle, Frozen, Random):
            patch.setitem(METHODS, cls.name, (__name__, "cheats"))
            patch.setitem(base._REGISTERED, cls.name, cls)
            register(cls)
        methods = ["idle", "frozen", "random", "tome"]
        config = settings(checkpoints, out / "compare", methods=methods, latency_repeats=1)
        compare_from_config(config, DATA.held_out)
        yield {record.arm.name: record for record in read_records(out / "compare")}


def test_honest_arms_have_no_flags(records: dict[str, Record]) -> None:
    assert records["dense"].flags == () and records["tome"].flags == ()
    assert records["tome"].paired_with == "dense" and records["dense"].paired_with is None


def test_doing_nothing_is_caught_and_scores_nothing(records: dict[str, Record]) -> None:
    idle = records["idle"]
    assert any(flag.startswith("does nothing") for flag in idle.flags)
    assert any(flag == "MACs under-reported: 0.800 of dense said, 1.000 counted" for flag in idle.flags)
    assert [timing["efficiency"] for timing in idle.cost["latency"]] == [0.0]
    assert idle.quality["psnr"]["value"] == 100


def test_the_seed_is_watched(records: dict[str, Record]) -> None:
    assert any(flag.startswith("ignores the seed") for flag in records["frozen"].flags)
    assert any(flag.startswith("not reproducible") for flag in records["random"].flags)
    for name in ("frozen", "random"):
        assert not any(flag.startswith("does nothing") for flag in records[name].flags)


def test_the_counter_counts_only_the_module_and_leaves_it_as_it_was() -> None:
    inner, outer = torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)
    assert count_macs(inner, lambda: outer(inner(torch.zeros(2, 3)))) == 30
    assert "forward" not in vars(inner)

    def fail() -> None:
        inner(torch.zeros(1, 4))

    with pytest.raises(RuntimeError):
        count_macs(inner, fail)
    assert "forward" not in vars(inner)
    query = torch.zeros(1, 2, 6, 4)
    attention = torch.nn.Module()
    attention.forward = lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert count_macs(attention, lambda: attention()) == 2 * 2 * 6 * 6 * 4
    assert "forward" in vars(attention)
