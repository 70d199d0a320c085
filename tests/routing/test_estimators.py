"""How ratios are learned: both estimators against each other and against differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quotients import check_ratio_gradient

import diffratio
from diffratio.backbones import get_backbone
from diffratio.surgery import attachment

LEVELS = (0.05, 0.3, 0.1, 0.55, 0.8, 0.95)  # regions 0 1 0 2 3 3
ON_BINS = [[0.5, 0.1, 1.0, 0.3], [1.0, 0.2, 0.9, 0.1], [0.7, 0.7, 0.7, 0.4]]
BETWEEN = [[0.55, 0.13, 0.98, 0.31], [0.42, 0.27, 0.91, 0.87], [0.73, 0.74, 0.76, 0.44]]
MIXED = [[0.5, 0.13, 1.0, 0.31], [0.42, 0.2, 0.91, 0.1], [0.7, 0.74, 0.7, 0.45]]
TABLES = pytest.mark.parametrize("table", [ON_BINS, BETWEEN, MIXED], ids=["on bins", "between", "mixed"])


def learning(table: list[list[float]], estimator: str = "grouped") -> Any:
    torch.manual_seed(0)
    transformer: Any = get_backbone("dit").tiny()
    diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator)).double().train()
    with torch.no_grad():
        transformer.keep_ratios.rho.copy_(torch.tensor(table, dtype=torch.float64))
        for block in transformer.transformer_blocks:
            block.router.weight.mul_(20)  # gates away from one half
    return transformer


def loss_of(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(len(LEVELS), 1, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
    timestep = torch.tensor([1000 * level for level in LEVELS])
    output = transformer(sample, timestep, torch.arange(len(LEVELS)), return_dict=False)[0]
    return (output - target).square().mean()


@TABLES
def test_grouped_equals_loop(table: list[list[float]]) -> None:
    results = []
    for estimator in ("grouped", "loop"):
        transformer = learning(table, estimator)
        loss = loss_of(transformer)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in transformer.named_parameters()}))
    (loss, gradients), (loss_loop, gradients_loop) = results
    assert abs(loss - loss_loop) < 1e-12
    assert gradients.keys() == gradients_loop.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_loop[name], atol=1e-12, rtol=1e-12, msg=name)
    assert (gradients["keep_ratios.rho"] != 0).all()


@TABLES
def test_the_ratio_gradient_is_a_difference_quotient(table: list[list[float]]) -> None:
    """Central between bins; on a bin the one from below, at the lowest ratio the one from above."""
    # the loss is a smooth function of the weight: one-sided quotients are off by their second order
    check_ratio_gradient(learning(table), table, loss_of, atol=1e-5, rtol=2e-3)


def test_the_loss_is_continuous_across_a_bin() -> None:
    transformer = learning(BETWEEN)
    rho = transformer.keep_ratios.rho
    with torch.no_grad():
        values = []
        for ratio in (0.5 - 3e-6, 0.5, 0.5 + 3e-6):
            rho[1, 1] = ratio
            values.append(float(loss_of(transformer)))
    assert max(values) - min(values) < 1e-4


def test_on_bins_the_interpolated_model_is_the_rounded_one() -> None:
    transformer = learning(ON_BINS)
    expected = loss_of(transformer)
    method = attachment(transformer).token_method
    method.bins = tuple(tuple(round(10 * ratio) for ratio in row) for row in ON_BINS)  # type: ignore[attr-defined]
    one_rounding = {"rtol": 1e-13, "atol": 0.0}  # products of other shapes add up in another order
    assert torch.allclose(loss_of(transformer.eval()), expected, **one_rounding)
    method.interpolate_in_eval = True  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.allclose(loss_of(transformer), expected, **one_rounding)


def test_freezing_fixes_the_schedule_and_leaves_nothing_behind() -> None:
    transformer = learning(MIXED)
    method: Any = attachment(transformer).token_method
    run = get_backbone("dit").default_run(transformer, 8)
    bins = ((10, 3, 7, 5), (4, 10, 2, 9), (6, 1, 10, 8))
    method.freeze_(diffratio.KeepSchedule(bins, run, 0.9))
    loss_of(transformer).backward()
    assert transformer.keep_ratios.rho.grad is None
    torch.manual_seed(0)
    other = get_backbone("dit").tiny()
    diffratio.apply_(other, diffratio.DiffCR(diffratio.KeepSchedule(bins, run, 0.9))).double()
    missing, extra = other.load_state_dict(transformer.state_dict(), strict=False)
    assert (missing, extra) == ([], ["keep_ratios.rho"])
    assert torch.equal(loss_of(other.eval()), loss_of(transformer.eval()))
    diffratio.remove_(transformer)
    assert not hasattr(transformer, "keep_ratios")


@pytest.mark.parametrize("sample_size", [2, 4, 6])
def test_ratios_stay_in_the_graph_where_bins_compute_equally_many_tokens(sample_size: int) -> None:
    """With fewer than ten tokens the highest bins are the same; DDP raises where a parameter gets no gradient."""
    transformer: Any = get_backbone("dit").tiny(sample_size=sample_size)
    reference = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    diffratio.apply_(transformer, diffratio.DiffCR()).train()
    batch = (torch.randn(2, 1, sample_size, sample_size), torch.tensor([100.0, 900.0]), torch.tensor([1, 2]))
    output = transformer(*batch, return_dict=False)[0]
    output.square().sum().backward()
    assert all(p.grad is not None for p in transformer.parameters() if p.requires_grad)
    diffratio.remove_(transformer)
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    assert all(torch.equal(p, reference[name]) for name, p in transformer.named_parameters())
    assert torch.equal(transformer(*batch, return_dict=False)[0], output)


def test_a_step_beyond_one_does_no_harm() -> None:
    transformer = learning(ON_BINS)
    with torch.no_grad():
        transformer.keep_ratios.rho[0] = torch.tensor([1.1, 1.3, 1.0, 0.05])
    loss = loss_of(transformer)
    loss.backward()
    with torch.no_grad():
        transformer.keep_ratios.rho[0] = torch.tensor([1.0, 1.0, 1.0, 0.1])
        assert torch.equal(loss_of(transformer), loss.detach())
    assert transformer.keep_ratios.rho.grad.isfinite().all()
