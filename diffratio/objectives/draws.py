"""Training randomness as a function of (seed, sample position): resume and process count cannot change it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffratio.errors import unknown
from diffratio.objectives.base import Objective
from diffratio.tokens.matching import mixed_seed

TIMESTEPS = ("iid", "stratified", "one_region")
_GOLDEN = 0.6180339887498949


def sample_draws(seed: int, positions: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A uniform number and a noise image for each sample.

    Args:
        seed: seed of the run.
        positions: position of each sample in the training stream.
        shape: (C, H, W).

    Returns:
        uniform (B,) in [0, 1) and normal noise (B, C, H, W), on the CPU.
    """
    uniform, noise = torch.empty(len(positions)), torch.empty(len(positions), *shape)
    generator = torch.Generator()
    for row, position in enumerate(positions):
        generator.manual_seed(mixed_seed(seed, 0x5EED, position))
        uniform[row] = torch.rand((), generator=generator)
        noise[row] = torch.randn(tuple(shape), generator=generator)
    return uniform, noise


def noise_levels(
    objective: Objective, uniform: Tensor, positions: Sequence[int], batch: int, timesteps: str, regions: int
) -> Tensor:
    """Training noise levels of a batch.

    Args:
        objective: gives the density.
        uniform: one draw a sample (B,).
        positions: position of each sample in the training stream.
        batch: samples that share a stratification or a region (the global micro-batch).
        timesteps: `iid`; `stratified`, each of `batch` equal slices of the density once a batch; `one_region`, the
            whole batch in one region, regions following the density over batches (golden-ratio sequence).
        regions: number of regions R.

    Returns:
        u (B,).
    """
    if timesteps not in TIMESTEPS:
        raise unknown("objective.timesteps", timesteps, TIMESTEPS)
    mass = uniform.double()
    index = torch.tensor(list(positions), dtype=torch.float64)
    if timesteps == "stratified":
        mass = (index % batch + mass) / batch
    elif timesteps == "one_region":
        edges = [objective.cumulative(region / regions) for region in range(regions + 1)]
        turn = (torch.div(index, batch, rounding_mode="floor") + 0.5) * _GOLDEN % 1.0
        region = torch.bucketize(turn, torch.tensor(edges[1:-1], dtype=torch.float64), right=True)
        low = torch.tensor(edges, dtype=torch.float64)
        mass = low[region] + mass * (low[region + 1] - low[region])
    return objective.quantile(mass.clamp(1e-6, 1 - 1e-6)).float()
