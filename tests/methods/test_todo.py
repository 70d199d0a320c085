"""Which keys are left, on any grid, and that attention sees exactly these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.run import uniform_run
from diffratio.methods.todo import kept_keys
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import strided_tokens


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_one_key_a_cell_on_odd_and_oblong_grids(height: int, width: int, factor: int) -> None:
    grid = TokenGrid(height, width)
    found = strided_tokens(grid, factor).tolist()
    assert found == [r * width + c for r in range(height) for c in range(width) if r % factor == c % factor == 0]
    assert len(found) == kept_keys(grid, factor)
    assert {(token // width // factor, token % width // factor) for token in found} == {
        (r // factor, c // factor) for r in range(height) for c in range(width)
    }


@pytest.mark.parametrize(("size", "factor"), [(8, 2), (8, 3), (10, 2), (14, 4), (10, 4)])
def test_blocks_attend_to_the_kept_keys_alone(size: int, factor: int) -> None:
    """Against stock blocks whose attention is given the kept tokens as its other tokens."""

    def tiny() -> Any:
        torch.manual_seed(0)
        return get_backbone("dit").tiny(sample_size=size).eval()

    keys = strided_tokens(TokenGrid(size // 2, size // 2), factor)
    stock = tiny()
    for block in stock.transformer_blocks:
        block.attn1.register_forward_pre_hook(
            lambda _, args, named: (args, named | {"encoder_hidden_states": args[0][:, keys]}), with_kwargs=True
        )
    batch = (torch.randn(2, 1, size, size), torch.tensor([700.0, 700.0]), torch.tensor([1, 2]))
    with torch.no_grad():
        found = diffratio.apply_(tiny(), diffratio.ToDo(factor=factor))(*batch).sample
        assert torch.equal(found, stock(*batch).sample)
        assert not torch.allclose(found, tiny()(*batch).sample, atol=1e-3)


def test_budgets_take_the_smallest_factors_and_the_middle_blocks() -> None:
    transformer = get_backbone("dit").tiny(num_layers=8, sample_size=16, num_attention_heads=4, attention_head_dim=16)
    run = uniform_run(5, TokenGrid(8, 8))
    config: Any = diffratio.for_budget("todo", transformer, 0.9, run=run)
    assert max(config.factor) == 2 and not config.as_published
    assert [i for i, one in enumerate(config.factor) if one == 2] == [2, 3, 4, 5]
    config = diffratio.for_budget("todo", transformer, 0.79, run=run)
    assert 0.78 <= diffratio.macs(diffratio.apply_(transformer, config), run=run).fraction <= 0.79
    assert "keys 16" in diffratio.summary(transformer, run=run)
    with pytest.raises(diffratio.BudgetUnreachable, match="MLP stay at full length"):
        diffratio.for_budget("todo", transformer, 0.6, run=run)
    assert diffratio.ToDo(factor=2).as_published


def test_compiles_as_one_graph() -> None:
    def tiny() -> Any:
        torch.manual_seed(0)
        return diffratio.apply_(get_backbone("dit").tiny().eval(), diffratio.ToDo(factor=2))

    batch = (torch.randn(2, 1, 8, 8), torch.tensor([700.0, 700.0]), torch.tensor([1, 2]))
    torch.compiler.reset()
    with torch.no_grad():
        compiled = diffratio.compile_(tiny(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*batch).sample, tiny()(*batch).sample, atol=1e-6, rtol=0)
    torch.compiler.reset()
