"""Optimizers by name; all are AdamW."""

from __future__ import annotations

from typing import Any

import torch

from diffratio.errors import DiffratioError


def make_optimizer(kind: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """An AdamW.

    Args:
        kind: of `settings.OPTIMIZERS`.
        groups: parameter groups, each with its `lr` and `weight_decay`.
        betas: Adam's.

    Raises:
        DiffratioError: torchao is not installed, or there is no fused kernel for where the parameters are.
    """
    if kind == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise DiffratioError("optimizer.kind=adamw_8bit needs torchao: pip install 'diffratio[lowbit]'") from None
        found = AdamW8bit(groups, betas=betas)
        assert isinstance(found, torch.optim.Optimizer)
        return found
    try:
        return torch.optim.AdamW(groups, betas=betas, fused=kind == "fused" or None)
    except RuntimeError as error:
        raise DiffratioError(f"optimizer.kind={kind}: {str(error).splitlines()[0]}; take kind=adamw") from None
