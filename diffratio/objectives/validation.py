"""Validation losses at fixed noise, region by region: the quickest fair comparison between trained arms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffratio.errors import unknown
from diffratio.inpainting.known import Known
from diffratio.objectives.base import Objective
from diffratio.tokens.matching import mixed_seed

PARTS = ("all", "hole", "known")

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def region_losses(
    predict: Predict,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    regions: int = 4,
    seed: int = 0,
    batch_size: int = 250,
    masks: Tensor | None = None,
    part: str = "all",
) -> Tensor:
    """Loss of every image once in every region.

    Levels are uniform within a region; level and noise depend on (seed, image index, region) alone, so two models see
    the same and their difference is paired.

    Args:
        predict: (inputs (B, C, H, W), noise levels (B,), labels (B,)) -> output; with masks the inputs are
            (B, 2 C + 1, H, W).
        objective: what is predicted.
        images: (n, C, H, W) in [-1, 1].
        labels: (n,).
        regions: number of regions R.
        seed: of level and noise.
        batch_size: forwards are made in batches of one region each.
        masks: holes of the images (n, 1, H, W), 1 = hole, of an inpainting model.
        part: `all` of the picture, or with masks the `hole` or the `known` rest alone.

    Returns:
        (n, R) on the CPU.
    """
    return part_losses(predict, objective, images, labels, (part,), regions, seed, batch_size, masks)[part]


@torch.no_grad()
def part_losses(
    predict: Predict,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    parts: Sequence[str] = PARTS,
    regions: int = 4,
    seed: int = 0,
    batch_size: int = 250,
    masks: Tensor | None = None,
) -> dict[str, Tensor]:
    """`region_losses` of several parts of the pictures at once: (n, R) by part."""
    for name in parts:
        if name not in PARTS or (name != "all" and masks is None):
            raise unknown("part of the pictures", name, PARTS if masks is not None else PARTS[:1])
    losses = {name: torch.empty(len(images), regions) for name in parts}
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
            inputs, where = noised.inputs, {"all": None}
            if masks is not None:
                known = Known(clean, masks[part].to(clean.device))
                inputs = torch.cat([inputs, known.channels], dim=1)
                where |= {"hole": known.masks, "known": 1 - known.masks}  # type: ignore[dict-item]
            output = predict(inputs, noised.noise_levels, labels[part].to(clean.device))
            for name in parts:
                counted = dataclasses.replace(noised, where=where[name])
                losses[name][part, region] = objective.losses(output, counted).cpu()
    return losses
