"""Gradients of keep ratios against difference quotients of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUDGE = 2e-5  # more than what counts as being on a bin


def check_ratio_gradient(
    transformer: Any, table: list[list[float]], loss_of: Callable[[Any], Tensor], atol: float, rtol: float
) -> None:
    """Central between bins; on a bin the quotient from below, at the lowest ratio the one from above."""
    loss_of(transformer).backward()
    rho = transformer.keep_ratios.rho
    gradient = rho.grad.clone()
    with torch.no_grad():
        for layer, row in enumerate(table):
            for region, ratio in enumerate(row):
                on_bin = abs(10 * ratio - round(10 * ratio)) < 1e-9
                below = 0.0 if on_bin and ratio == 0.1 else NUDGE
                above = NUDGE if not on_bin or ratio == 0.1 else 0.0
                values = []
                for at in (ratio + above, ratio - below):
                    rho[layer, region] = at
                    values.append(loss_of(transformer))
                rho[layer, region] = ratio
                quotient = (values[0] - values[1]) / (above + below)
                torch.testing.assert_close(gradient[layer, region], quotient, atol=atol, rtol=rtol)
