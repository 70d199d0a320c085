"""Validation losses: paired between models, independent of how they are batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffratio.cost.run import regions_of
from diffratio.objectives import FlowMatching, NoisePrediction, Objective
from diffratio.objectives.validation import region_losses

IMAGES, LABELS = torch.rand(7, 1, 4, 4) * 2 - 1, torch.arange(7)


def smooth(inputs: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
    return inputs * levels[:, None, None, None] + labels[:, None, None, None] / 10


@pytest.mark.parametrize("objective", [FlowMatching(), NoisePrediction()], ids=["flow", "noise"])
def test_independent_of_batch_size_and_of_other_images(objective: Objective) -> None:
    whole = region_losses(smooth, objective, IMAGES, LABELS, regions=4)
    assert whole.shape == (7, 4)
    for size in (1, 3, 7):
        torch.testing.assert_close(region_losses(smooth, objective, IMAGES, LABELS, batch_size=size), whole)
    torch.testing.assert_close(region_losses(smooth, objective, IMAGES[:2], LABELS[:2]), whole[:2])


def test_models_see_the_same_noise_and_levels() -> None:
    seen: list[list[Tensor]] = [[], []]
    for i in range(2):

        def record(inputs: Tensor, levels: Tensor, labels: Tensor, i: int = i) -> Tensor:
            torch.rand(i + 1)  # a model's own draws change nothing
            seen[i] += [inputs, levels, labels]
            return inputs * i

        region_losses(record, FlowMatching(), IMAGES, LABELS, batch_size=3)
    assert len(seen[0]) == len(seen[1]) == 3 * 4 * 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_every_image_once_in_every_region() -> None:
    seen: dict[int, list[int]] = {}

    def record(inputs: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        for label, region in zip(labels.tolist(), regions_of(levels, 5).tolist(), strict=True):
            seen.setdefault(label, []).append(region)
        return inputs

    region_losses(record, FlowMatching(), IMAGES, LABELS, regions=5, batch_size=2)
    assert seen == {label: [0, 1, 2, 3, 4] for label in range(7)}


def test_another_seed_is_another_noise() -> None:
    first, second = (region_losses(smooth, FlowMatching(), IMAGES, LABELS, seed=seed) for seed in (0, 1))
    assert not (first == second).any()


def test_makes_no_graph_and_leaves_the_generator() -> None:
    weight = torch.ones(1, requires_grad=True)
    torch.manual_seed(5)
    losses = region_losses(lambda x, u, y: x * weight, FlowMatching(), IMAGES, LABELS)
    assert not losses.requires_grad
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_a_better_model_has_lower_losses_everywhere() -> None:
    """Paired: the loss of the exact answer is zero image by image, and a constant error is its square."""
    clean = {int(label): image for label, image in zip(LABELS, IMAGES, strict=True)}

    def exact(inputs: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        own = torch.stack([clean[int(label)] for label in labels])
        u = levels[:, None, None, None]
        return (inputs - own) / u  # e - x_0 = (x_u - x_0) / u

    torch.testing.assert_close(
        region_losses(exact, FlowMatching(), IMAGES, LABELS)[:, 1:], torch.zeros(7, 3), atol=1e-9, rtol=0
    )
    off = region_losses(lambda x, u, y: exact(x, u, y) + 0.5, FlowMatching(), IMAGES, LABELS)
    torch.testing.assert_close(off[:, 1:], torch.full((7, 3), 0.25), atol=1e-5, rtol=0)
