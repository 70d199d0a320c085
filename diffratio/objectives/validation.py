"""Validation losses at fixed noise, region by region: the quickest fair comparison between trained arms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffratio.objectives.base import Objective
from diffratio.tokens.matching import mixed_seed


@torch.no_grad()
def region_losses(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    regions: int = 4,
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """Loss of every image once in every region.

    Levels are uniform within a region; level and noise depend on (seed, image index, region) alone, so two models see
    the same and their difference is paired.

    Args:
        predict: (inputs (B, C, H, W), noise levels (B,), labels (B,)) -> output.
        objective: what is predicted.
        images: (n, C, H, W) in [-1, 1].
        labels: (n,).
        regions: number of regions R.
        seed: of level and noise.
        batch_size: forwards are made in batches of one region each.

    Returns:
        (n, R) on the CPU.
    """
    losses = torch.empty(len(images), regions)
    for region in range(regions):
        for start in range(0, len(images), batch_size):
            part = slice(start, min(start + batch_size, len(images)))
            clean = images[part]
            levels, noise = torch.empty(len(clean)), torch.empty(clean.shape)
            generator = torch.Generator()
            for row in range(len(clean)):
                generator.manual_seed(mixed_seed(seed, 0xA11, start + row, region))
                levels[row] = (region + torch.rand((), generator=generator)) / regions
                noise[row] = torch.randn(clean.shape[1:], generator=generator)
            noised = objective.noised(clean, noise.to(clean.device), levels.to(clean.device))
            output = predict(noised.inputs, noised.noise_levels, labels[part].to(clean.device))
            losses[part, region] = objective.losses(output, noised).cpu()
    return losses
