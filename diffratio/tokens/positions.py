"""Positions of a joint sequence, text tokens first, sliced like the image tokens that a plan computes."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio.tokens.plan import Plan

Positions = tuple[Tensor, ...]  # tables such as cos and sin, (T + N, D) for all samples or (B or 1, T + N, D)


def take_positions(positions: Positions, plan: Plan, tokens: int) -> Positions:
    """Positions of all text tokens and of the image tokens that a plan computes.

    Args:
        positions: of T text and after them N image tokens.
        plan: which image tokens.
        tokens: number of image tokens N.

    Returns:
        Tables (B or 1, T + K, D).
    """
    return tuple(_taken(one if one.ndim == 3 else one[None], plan, tokens) for one in positions)


def _taken(table: Tensor, plan: Plan, tokens: int) -> Tensor:
    text = table.shape[1] - tokens
    image = plan.take(table[:, text:])  # (B or 1, K, D)
    return torch.cat([table[:, :text].expand(len(image), -1, -1), image], dim=1)


def of_samples(positions: Positions, samples: Tensor) -> Positions:
    """Positions of some samples (b,), where they differ between samples."""
    return tuple(one.index_select(0, samples) if one.ndim == 3 and one.shape[0] > 1 else one for one in positions)
