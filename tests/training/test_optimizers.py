"""Kinds of AdamW."""

from __future__ import annotations

import sys

import pytest
import torch

from diffratio.errors import DiffratioError
from diffratio.training.optimizers import make_optimizer
from diffratio.training.settings import OptimizerSettings


def stepped(kind: str, steps: int = 3) -> list[torch.Tensor]:
    """Parameters of two groups after a few steps on a quadratic."""
    torch.manual_seed(0)
    weights, router = (torch.nn.Parameter(torch.randn(64, 128)) for _ in range(2))
    groups = [
        {"params": [weights], "lr": 1e-2, "weight_decay": 0.1, "name": "weights"},
        {"params": [router], "lr": 1e-1, "weight_decay": 0.0, "name": "routers"},
    ]
    optimizer = make_optimizer(kind, groups, (0.9, 0.99))
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "routers"]
    for _ in range(steps):
        optimizer.zero_grad()
        sum(one.square().sum() for one in (weights, router)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return [weights.detach(), router.detach()]


def test_fused_is_adamw() -> None:
    for fused, plain in zip(stepped("fused"), stepped("adamw"), strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.slow
def test_eight_bit_moments_are_near_adamw() -> None:
    pytest.importorskip("torchao")
    for low, plain in zip(stepped("adamw_8bit"), stepped("adamw"), strict=True):
        torch.testing.assert_close(low, plain, atol=2e-2, rtol=0)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(DiffratioError, match="needs torchao: pip install"):
        stepped("adamw_8bit")
    with pytest.raises(DiffratioError, match="optimizer.kind 'adam8': .*adamw_8bit|unknown optimizer.kind 'adam8'"):
        OptimizerSettings(kind="adam8")
