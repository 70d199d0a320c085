"""Analytic costs against figures that are known."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.macs import macs_table, tokens_of_bin
from diffratio.cost.run import uniform_run
from diffratio.surgery import describe


@pytest.fixture(scope="module")
def dit_xl() -> torch.nn.Module:
    with torch.device("meta"):
        return get_backbone("dit").from_config(
            {
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "sample_size": 32,
                "patch_size": 2,
                "num_embeds_ada_norm": 1000,
            }
        )


def test_dit_xl_2_at_256(dit_xl: torch.nn.Module) -> None:
    """The DiT paper gives 118.64 Gflops, which are MACs."""
    cost = diffratio.macs(dit_xl, steps=1, guidance=False)
    assert cost.total == pytest.approx(118.6e9, rel=0.005)
    assert cost.fraction == 1.0
    assert diffratio.macs(dit_xl, steps=20, guidance=True).total == 40 * cost.total


def test_description_needs_no_weights(dit_xl: torch.nn.Module) -> None:
    description = describe(dit_xl)
    assert (description.layers, description.width, description.family) == (28, 1152, "dit")


@given(st.integers(0, 10), st.integers(1, 5000), st.integers(1, 64))
def test_tokens_of_bin(bin_: int, tokens: int, alignment: int) -> None:
    exact = math.ceil(Fraction(bin_ * tokens, 10))
    assert tokens_of_bin(bin_, tokens) == exact
    kept = tokens_of_bin(bin_, tokens, alignment)
    assert exact <= kept <= tokens
    assert kept == tokens or (kept % alignment == 0 and kept < exact + alignment)


def test_tokens_of_bin_where_floats_are_off_by_one() -> None:
    assert [tokens_of_bin(j, 100) for j in range(11)] == [10 * j for j in range(11)]
    assert math.ceil(0.1 * 3 * 10) == 4  # what a float ceil makes of bin 3 of 10 tokens
    assert tokens_of_bin(3, 10) == 3


def test_cost_table_rows_rise_and_price_the_router() -> None:
    transformer = get_backbone("dit").tiny()
    run = uniform_run(4, get_backbone("dit").grid(transformer))
    description = describe(transformer)
    costs, free = macs_table(description, run), macs_table(description, run, router=False)
    for row, plain in zip(costs.cells, free.cells, strict=True):
        assert row[0] == 0
        assert list(row) == sorted(row)
        assert row[10] == plain[10]
        assert {row[j] - plain[j] for j in range(1, 10)} == {16 * 16}  # N d
    assert costs.fraction([[10]] * 3) == 1.0
    assert costs.dense * run.steps * run.halves == description.dense(run)


def test_cost_table_agrees_with_the_method() -> None:
    transformer = get_backbone("dit").tiny()
    run = uniform_run(8, get_backbone("dit").grid(transformer))
    bins = ((10, 3, 0, 5), (4, 10, 2, 9), (6, 1, 10, 8))
    diffratio.apply_(transformer, diffratio.DiffCR(diffratio.KeepSchedule(bins, run, 0.9)))
    expected = diffratio.macs(transformer, run=run).fraction
    assert macs_table(describe(transformer), run).fraction(bins) == pytest.approx(expected, rel=1e-12)
