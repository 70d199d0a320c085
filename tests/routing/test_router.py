"""The router: logits, ranking, gate."""

from __future__ import annotations

import pytest
import torch

from diffratio.routing.router import TokenRouter, best, ranking, straight_through

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_is_exact_in_value(dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 500, 8).to(dtype), (100 * torch.randn(3, 500, 8)).to(dtype)
    logits = 6 * torch.randn(3, 500, dtype=torch.promote_types(dtype, torch.float32))
    assert torch.equal(straight_through(x, y, logits), y)
    mixed = straight_through(x.float(), y, logits)  # autocast: the residual stream and a block's result differ in dtype
    assert mixed.dtype == y.dtype
    assert torch.equal(mixed, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_gradient(dtype: torch.dtype) -> None:
    x, y = (torch.randn(2, 6, 4, dtype=dtype).requires_grad_() for _ in range(2))
    logits = torch.randn(2, 6, dtype=dtype).requires_grad_()
    upstream = torch.randn(2, 6, 4, dtype=dtype)
    straight_through(x, y, logits).backward(upstream)
    gate = torch.sigmoid(logits.detach())
    slope = ((y - x).detach() * upstream).sum(-1) * gate * (1 - gate)
    torch.testing.assert_close(logits.grad, slope)
    torch.testing.assert_close(y.grad, upstream)
    torch.testing.assert_close(x.grad, torch.zeros_like(upstream))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_exact_under_autocast_and_in_half_precision(dtype: torch.dtype) -> None:
    router = TokenRouter(16)
    x = torch.randn(2, 9, 16).to(dtype)
    expected = (x.double() @ router.weight.double() + router.bias.double()).float()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = router(x)
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(logits.float(), expected, atol=1e-6, rtol=1e-5)


def test_ranking_is_stable_and_nested() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0, 1.0]])
    ranked = ranking(logits)
    assert ranked.tolist() == [[1, 2, 4, 0, 5, 3]]
    assert [best(ranked, k).tolist()[0] for k in (1, 3, 4, 6)] == [[1], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5]]
    many = ranking(torch.randn(4, 40))
    for k in range(1, 40):
        smaller, larger = best(many, k), best(many, k + 1)
        assert all(set(a) < set(b) for a, b in zip(smaller.tolist(), larger.tolist(), strict=True))
