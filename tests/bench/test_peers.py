"""Other people's tools: those that attach save what is counted, those that do not say so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.bench import peers
from diffratio.bench.models import wide_dit
from diffratio.bench.peers import PEERS, Fitted, Peer, fit
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import DiffratioError

STEPS = 5


@pytest.fixture(scope="module")
def transformer() -> Any:
    return wide_dit(64, 4, 64, "cpu", torch.float32)


def call(model: Any) -> Callable[[], object]:
    """Five forwards of two slowly changing samples."""

    @torch.no_grad()
    def run() -> None:
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for step in range(STEPS):
            timestep = torch.full((2,), 1000.0 - 200 * step)
            x = x - 0.1 * model(x, timestep=timestep, class_labels=torch.arange(2), return_dict=False)[0]

    return run


def run_of(transformer: Any) -> SamplingRun:
    return uniform_run(STEPS, backbone_of(transformer).grid(transformer), "none")


def fitted(name: str, transformer: Any, budget: float = 0.8) -> Fitted:
    return fit(name, transformer, run_of(transformer), budget, lambda model: model, call, 2)


@pytest.mark.parametrize(
    "name",
    ["first_block_cache", "mag_cache", "pyramid_attention_broadcast", "faster_cache", "taylorseer_cache", "tomesd"],
)
def test_peers_that_attach_meet_the_budget_and_run_again(name: str, transformer: Any) -> None:
    pytest.importorskip(PEERS[name].module)
    found = fitted(name, transformer)
    assert found.status == "measured" and found.note == ""
    assert found.macs is not None and 0.3 < found.macs <= 0.8
    for _ in range(2):  # the state of a run does not reach into the next
        with found.around():
            call(found.transformer)()
    assert not hasattr(transformer, "_tome_info")
    assert type(transformer.transformer_blocks[0]).__name__ == "BasicTransformerBlock"


def test_cache_dit_attaches_where_it_is_installed(transformer: Any) -> None:
    found = fitted("cache_dit", transformer)
    if found.status == "not installed":
        assert "diffratio[peers]" in found.note
        return
    assert found.status == "measured" and found.macs is not None and 0.3 < found.macs <= 0.8


def test_peers_that_do_not_attach_say_so(transformer: Any) -> None:
    found = fitted("sea_cache", transformer)
    assert found.status == "does not attach" and found.note and found.transformer is None


def test_tomesd_costs_what_our_merging_costs(transformer: Any) -> None:
    pytest.importorskip("tomesd")
    run = run_of(transformer)
    found = fitted("tomesd", transformer)
    ours = found.knob
    assert not ours.mix  # tomesd removes equally many tokens everywhere
    cost = ours.method(ours, surgery.describe(transformer)).macs(run)
    assert 0.75 < cost.fraction <= 0.8
    assert found.macs == pytest.approx(cost.fraction, abs=1e-12) and cost.planning > 0


def attach_skipping(transformer: Any, run: SamplingRun, knob: int) -> Any:
    """Leaves out the feed-forward of so many blocks."""
    for block in list(transformer.transformer_blocks)[:knob]:
        block.ff.forward = torch.zeros_like
    return contextlib.nullcontext


def test_the_mildest_setting_within_the_budget_is_taken(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "skipping", Peer("torch", attach_skipping, (0, 1, 2, 3, 4)))
    by_knob = {budget: fitted("skipping", transformer, budget).knob for budget in (0.95, 0.75, 0.6)}
    each = surgery.describe(transformer).blocks[0].sites[1].macs(64, 64, 0) * STEPS
    share = each / surgery.describe(transformer).dense(run_of(transformer))
    for budget, knob in by_knob.items():
        assert 1 - knob * share <= budget < 1 - (knob - 1) * share
    missed = fitted("skipping", transformer, 0.2)
    assert missed.knob == 4 and missed.macs == pytest.approx(1 - 4 * share)
    assert "misses the budget of 0.2" in missed.note and missed.status == "measured"


def test_a_peer_that_changes_nothing_does_not_attach(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "idle", Peer("torch", attach_skipping, (0,)))
    assert fitted("idle", transformer).status == "does not attach"


def test_absent_and_unknown_peers(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert fitted("tomesd", transformer).status == "not installed"
    with pytest.raises(DiffratioError, match="unknown peer 'tomsd': did you mean tomesd"):
        fitted("tomsd", transformer)
