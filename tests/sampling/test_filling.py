"""Class-conditional pipelines of inpainting models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffratio.backbones import get_backbone
from diffratio.backbones.widening import widen_
from diffratio.errors import DiffratioError
from diffratio.inpainting import InpaintSettings, Known, Masks
from diffratio.sampling.generate import generate, in_turn
from diffratio.sampling.known import triples
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.schedulers import make_scheduler


def pipe_of(sampler: str, objective: str) -> Any:
    torch.manual_seed(0)
    transformer: Any = widen_(get_backbone("dit").tiny(out_channels=2 if objective == "noise" else 1), 3).eval()
    torch.nn.init.normal_(transformer.pos_embed.proj.weight)
    return build_pipeline(transformer, make_scheduler(sampler, objective))


def known(n: int) -> Known:
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Known(images, Masks(InpaintSettings("boxes", (0.3, 0.3)), 8, 0).fixed(range(n)))


@pytest.mark.parametrize(("sampler", "objective"), [("flow_euler", "flow"), ("ddim", "noise"), ("ddpm", "noise")])
def test_what_is_known_stays_and_the_hole_is_filled(sampler: str, objective: str) -> None:
    pipe, given = pipe_of(sampler, objective), known(5)
    pictures = generate(pipe, 5, labels=[1, 2, 3, 4, 5], steps=3, quiet=True, known=given)
    hole = given.masks > 0.5
    assert torch.allclose(pictures[~hole], given.images[~hole], atol=1e-6)
    assert not torch.allclose(pictures[hole], given.images[hole], atol=0.1)
    other = Known(torch.where(hole, -given.images, given.images), given.masks)
    assert torch.equal(pictures, generate(pipe, 5, labels=[1, 2, 3, 4, 5], steps=3, quiet=True, known=other))
    changed = Known(torch.where(hole, given.images, -given.images), given.masks)
    elsewhere = generate(pipe, 5, labels=[1, 2, 3, 4, 5], steps=3, quiet=True, known=changed)
    assert not torch.equal(pictures[hole], elsewhere[hole])  # the model looks at what is known
    assert triples(given, pictures).shape == (15, 1, 8, 8)


def test_a_pipeline_takes_its_own_pictures_and_classes_in_turn() -> None:
    pipe = pipe_of("flow_euler", "flow")
    pipe.known, pipe.asked = known(3), (7, 8, 9)
    assert in_turn(pipe, 4, start=1) == [8, 9, 7, 8]
    found = generate(pipe, 4, steps=2, quiet=True, batch_size=3)
    given = generate(pipe, 4, labels=[7, 8, 9, 7], steps=2, quiet=True, known=pipe.known.take([0, 1, 2, 3]))
    assert torch.allclose(found, given, atol=1e-6)
    assert torch.allclose(generate(pipe, 2, steps=2, quiet=True, start=2), found[2:], atol=1e-5)
    with pytest.raises(DiffratioError, match="3 pictures to inpaint for n=4 samples"):
        generate(pipe, 4, steps=2, quiet=True, known=known(3))


def test_a_latent_pipeline_shows_no_masks() -> None:
    transformer = widen_(get_backbone("dit").tiny(), 3)
    with pytest.raises(DiffratioError, match="sampled in pixel space alone"):
        build_pipeline(transformer, make_scheduler("ddim", "noise"), vae=object())
