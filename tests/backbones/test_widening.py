"""A widened transformer is the one that it was made from until it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.backbones.widening import image_channels, inpaints, widen_
from diffratio.checkpoint import export
from diffratio.errors import DiffratioError


def forward(transformer: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    backbone = backbone_of(transformer)
    arguments = backbone.example(transformer, len(sample))
    if "encoder_hidden_states" in arguments:  # drawn after a sample of as many channels as the model sees
        generator = torch.Generator().manual_seed(0)
        text = arguments["encoder_hidden_states"]
        arguments["encoder_hidden_states"] = torch.randn(text.shape, generator=generator)
    arguments["hidden_states"] = sample
    with torch.no_grad():
        output = transformer(**arguments, timestep=torch.full((len(sample),), 500.0), return_dict=False)[0]
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize("variance", [1, 2])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_the_start_is_the_base_bit_for_bit(name: str, variance: int) -> None:
    backbone = get_backbone(name)
    transformer: Any = backbone.tiny(in_channels=3, out_channels=3 * variance).eval()
    x, shown = torch.randn(3, 3, 8, 8), torch.randn(3, 4, 8, 8)
    before = forward(transformer, x)
    costs = backbone.describe(transformer)
    assert not inpaints(transformer) and image_channels(transformer) == 3
    assert widen_(transformer, 7) is transformer
    assert transformer.config.in_channels == 7 and transformer.config.out_channels == 3 * variance
    assert inpaints(transformer) and image_channels(transformer) == 3
    after = forward(transformer, torch.cat([x, shown], dim=1))
    assert torch.equal(before, after)
    assert backbone.per_token_output(transformer, after).shape == (3, 16, 3 * 4)
    wide, width = backbone.describe(transformer), costs.width
    assert wide.per_token - costs.per_token == 4 * 4 * width and wide.blocks == costs.blocks
    with torch.no_grad():
        transformer.pos_embed.proj.weight[:, 3:].normal_()
    assert not torch.equal(forward(transformer, torch.cat([x, shown], dim=1)), before)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_it_exports_and_loads(name: str, tmp_path: Path) -> None:
    transformer = widen_(get_backbone(name).tiny(in_channels=1, out_channels=None), 3).eval()
    diffratio.apply_(transformer, diffratio.for_budget("mod", transformer, 0.8, steps=4))
    export(transformer, tmp_path / "out", card={"name": "wide", "inpaint": {"mask": "boxes"}})
    again = diffratio.load_transformer(tmp_path / "out")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(forward(transformer, x), forward(again, x)) and inpaints(again)
    with pytest.raises(DiffratioError, match="no more than pictures of 1 channels"):
        export(get_backbone(name).tiny(), tmp_path / "not", card={"name": "n", "inpaint": {"mask": "boxes"}})


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (2, 1), (3, 3), (6, 3), (4, 4), (8, 4), (9, 9)])
def test_a_model_of_any_number_of_channels_is_not_taken_for_a_widened_one(outputs: int, inputs: int) -> None:
    transformer = get_backbone("dit").tiny(in_channels=inputs, out_channels=outputs)
    assert image_channels(transformer) == inputs and not inpaints(transformer)
    assert image_channels(widen_(transformer, 2 * inputs + 1)) == inputs and inpaints(transformer)


def test_what_cannot_be_widened_is_refused() -> None:
    transformer = get_backbone("dit").tiny(in_channels=3, out_channels=3)
    with pytest.raises(DiffratioError, match="in_channels=3 must be more than the 3"):
        widen_(transformer, 3)
    widen_(transformer, 7)
    with pytest.raises(DiffratioError, match="widened already: it sees 7 channels for pictures of 3"):
        widen_(transformer, 15)
