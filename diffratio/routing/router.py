"""The token router: one logit a token, a ranking, and a gate that is exact in value."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenRouter(nn.Module):
    """One linear map d -> 1 on the raw block input, always in fp32 (or fp64).

    Args:
        width: channels d of an image token.
        sees_mask: whether it also takes the share of each token's patch that is hole (inpainting), with a weight of 0
            to begin with.

    Source: arXiv 2412.16822, section 3 (token-level routing).
    """

    def __init__(self, width: int, sees_mask: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.weight, std=0.02)
        self.hole = nn.Parameter(torch.zeros(1)) if sees_mask else None

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """(B, N, C), and (B, N) where it sees the mask -> logits (B, N). In half precision ties would make the ranking
        arbitrary.

        The input is detached: the gate has no influence on the value, so through it only the router itself may learn.
        Otherwise weights and ratios of earlier blocks would get a gradient that no change of the loss stands for.
        """
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            logits = x.detach().to(exact) @ self.weight.to(exact) + self.bias.to(exact)
            if self.hole is None:
                return logits
            assert share is not None
            return logits + share.to(exact) * self.hole.to(exact)


def ranking(logits: Tensor) -> Tensor:
    """(B, N) -> token indices from best to worst. A stable sort, so the first k are nested in the first k + 1."""
    return logits.detach().argsort(dim=1, descending=True, stable=True)


def best(ranked: Tensor, kept: int) -> Tensor:
    """The k best of a ranking (B, N) in raster order, (B, k)."""
    return ranked[:, :kept].sort(dim=1).values


def learns(logits: Tensor) -> bool:
    """Whether a gate on these logits would get gradient."""
    return torch.is_grad_enabled() and logits.requires_grad


def straight_through(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
    """Gives the router gradient without changing the value.

    Args:
        x: block input of the computed tokens (B, K, C).
        y: block output of the same tokens (B, K, C).
        logits: their logits (B, K).

    Returns:
        y, bit for bit; its derivative is that of x + g (y - x) at g = 1, with dg = d sigmoid(logits).
    """
    gate = torch.sigmoid(logits)
    weight = 1 + (gate - gate.detach())  # (1 + g) - g would not be 1 in floating point
    return torch.lerp(x.to(y.dtype), y, weight[..., None].to(y.dtype))
