"""Tiny PixArt pipelines with every part that those on the hub have, random weights."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffratio.backbones import get_backbone

TEXT = 12  # text tokens
PIPELINES = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}
_LETTERS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in ascii_lowercase)]


def tiny_pipeline(kind: str, **changes: Any) -> Any:
    """A pipeline in latent space whose prompts are spelled letter by letter; `changes` are the transformer's."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 4} | changes
    vae = AutoencoderKL(
        block_out_channels=(8, 8),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        norm_num_groups=4,
        latent_channels=4,
    )
    config = T5Config(vocab_size=32, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = PIPELINES[kind](
        tokenizer=T5Tokenizer(vocab=_LETTERS, extra_ids=0),
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae.eval(),
        transformer=get_backbone("pixart").tiny(**sizes).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, prompts: tuple[str, ...] = ("a cat", "two dogs"), **options: Any) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1]; the same noise every time."""
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "num_inference_steps": 5,
        "guidance_scale": 4.5,
        "max_sequence_length": TEXT,
        "use_resolution_binning": False,
        "clean_caption": False,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "pt",
    }
    images = pipe(list(prompts), **(settings | options)).images
    assert isinstance(images, torch.Tensor)
    return images
