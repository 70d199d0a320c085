"""Routers of inpainting models that see how much of each token is hole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffratio
from diffratio.backbones import get_backbone
from diffratio.backbones.widening import widen_
from diffratio.cost.macs import macs_table
from diffratio.errors import DiffratioError
from diffratio.methods.routed import RoutedMethod
from diffratio.surgery import attachment


def wide(**changes: Any) -> nn.Module:
    torch.manual_seed(1)
    return widen_(get_backbone("dit").tiny(**changes), 3).eval()


def routed(sees: bool, keep: float = 0.5) -> tuple[nn.Module, RoutedMethod]:
    transformer = wide()
    torch.manual_seed(2)
    diffratio.apply_(transformer, diffratio.MoD(keep=keep, router_sees_mask=sees))
    method = attachment(transformer).token_method
    assert isinstance(method, RoutedMethod)
    return transformer, method


def sample(batch: int = 3) -> Tensor:
    """4x4 tokens of 2x2 pixels; the hole is the left half, in sample 2 the top half."""
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 2:] = 0
    x[:2, 2:, :, :4] = 1
    x[2, 2:, :4] = 1
    return x


def forward(transformer: nn.Module, x: Tensor) -> Tensor:
    labels = torch.zeros(len(x), dtype=torch.long)
    times = torch.linspace(100, 900, len(x))
    output = transformer(x, timestep=times, class_labels=labels, return_dict=False)[0]
    assert isinstance(output, Tensor)
    return output


def test_the_start_is_unchanged_bit_for_bit() -> None:
    with torch.no_grad():
        assert torch.equal(forward(routed(True)[0], sample()), forward(routed(False)[0], sample()))


def test_a_weight_on_the_mask_keeps_the_hole() -> None:
    transformer, method = routed(True)
    method.kept_index = []
    with torch.no_grad():
        for router in method.routers:
            assert router.hole is not None
            router.hole.fill_(1e3)
        forward(transformer, sample())
    for index in method.kept_index:
        assert index is not None and index.shape == (3, 8)
        for row in index[:2]:
            assert row.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
        assert index[2].tolist() == list(range(8))


def test_the_router_costs_one_input_more() -> None:
    (transformer, seeing), (_, blind) = routed(True), routed(False)
    run = get_backbone("dit").default_run(transformer, 5)
    more = seeing.macs(run).planning - blind.macs(run).planning
    assert more == 16 * 3 * run.forwards
    table = macs_table(seeing.description, run)
    assert table.fraction(seeing.bins) == pytest.approx(seeing.macs(run).fraction, abs=1e-12)


@pytest.mark.parametrize("estimator", ["grouped", "soft", "loop"])
def test_it_learns_while_ratios_are_learned(estimator: str) -> None:
    transformer = wide().train()
    diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator, router_sees_mask=True))
    method: Any = attachment(transformer).token_method
    with torch.no_grad():
        method.ratios.rho.copy_(torch.linspace(0.3, 0.9, method.ratios.rho.numel()).view_as(method.ratios.rho))
    forward(transformer, sample()).square().mean().backward()
    for router in method.routers:
        assert router.hole.grad is not None and float(router.hole.grad.abs()) > 0


def test_it_is_refused_where_there_is_no_mask_or_no_router() -> None:
    with pytest.raises(DiffratioError, match="router_sees_mask=true is for routers of inpainting models"):
        diffratio.apply_(get_backbone("dit").tiny(), diffratio.MoD(keep=0.5, router_sees_mask=True))
    with pytest.raises(DiffratioError, match="here are no routers"):
        diffratio.apply_(wide(), diffratio.RandomKeep(router_sees_mask=True))
