from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel


def build(out_channels: int = 1, classes: int = 10, size: int = 8, channels: int = 1) -> DiTTransformer2DModel:
    """A small DiT with random weights in every layer, so that time, class and position all matter."""
    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=out_channels,
        num_layers=2,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    return model.eval()


@pytest.fixture
def tiny_dit() -> Callable[..., DiTTransformer2DModel]:
    return build


@pytest.fixture
def dit() -> DiTTransformer2DModel:
    return build()
