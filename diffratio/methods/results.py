"""Results of sites that a method stores at full length from step to step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffratio.cost.macs import Description
from diffratio.cost.run import Halves


def of_halves(had: Halves, stored: Tensor, wanted: Halves) -> Tensor:
    """Stored results for the halves of another forward; a missing unconditional half takes the conditional one's.

    Args:
        had: which guidance halves were stored.
        stored: (B, N, C).
        wanted: which ones the forward holds.
    """
    if wanted == "cond" and had in ("cond_first", "uncond_first"):
        return stored.chunk(2)[0 if had == "cond_first" else 1]
    if had == "cond" and wanted in ("cond_first", "uncond_first"):
        return torch.cat([stored, stored])
    return stored


def numbers_of_sites(description: Description, layers: Iterable[int], sites: Iterable[str], tokens: int) -> int:
    """Numbers of one result (N, C) of every module that stands for one of the sites, for one guidance half.

    Args:
        description: the transformer.
        layers: blocks that store.
        sites: sites that store; a block's second attention stores a result of its own.
        tokens: number of image tokens N.
    """
    wanted = set(sites)
    modules = sum(site.name in wanted for layer in layers for site in description.blocks[layer].sites)
    return modules * tokens * description.width
