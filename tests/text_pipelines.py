"""Tiny text-to-image pipelines with every part that those on the hub have, random weights."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffratio.backbones import get_backbone

TEXT = 12  # text tokens of T5
CLIP = 8  # and of the CLIP encoders, before them; those of the hub take 77
PIPELINES = {
    "alpha": PixArtAlphaPipeline,
    "sigma": PixArtSigmaPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}
TEXT_TOKENS = {"alpha": TEXT, "sigma": TEXT, "sd3": CLIP + TEXT, "flux": TEXT}
_LETTERS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in ascii_lowercase)]


def tiny_pipeline(kind: str, clip_tokens: int = CLIP, **changes: Any) -> Any:
    """A pipeline in latent space whose prompts are spelled letter by letter; `changes` are the transformer's."""
    torch.manual_seed(0)
    if kind == "sd3":
        return _stable_diffusion_3(clip_tokens, **changes)
    if kind == "flux":
        return _flux(clip_tokens, **changes)
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 4} | changes
    pipe = PIPELINES[kind](
        tokenizer=T5Tokenizer(vocab=_LETTERS, extra_ids=0),
        text_encoder=_t5(),
        vae=_vae(),
        transformer=get_backbone("pixart").tiny(**sizes).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stable_diffusion_3(clip_tokens: int, **changes: Any) -> Any:
    """SD3.5's parts: two CLIP encoders, whose channels stand side by side, and T5 after them."""
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 4} | changes
    clip = [
        {"tokenizer": _clip_tokenizer(clip_tokens), "text_encoder": _clip(channels, clip_tokens)} for channels in (4, 8)
    ]
    vae = _vae(shift=0.1, channels=sizes["in_channels"])
    pipe = StableDiffusion3Pipeline(
        **clip[0],
        **{f"{name}_2": part for name, part in clip[1].items()},
        tokenizer_3=T5Tokenizer(vocab=_LETTERS, extra_ids=0),
        text_encoder_3=_t5(),
        vae=vae,
        transformer=get_backbone("sd3").tiny(**sizes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flux(clip_tokens: int, **changes: Any) -> Any:
    """FLUX.1-dev's parts: a CLIP encoder, whose pooled state alone is used, and T5; guidance as an input."""
    sizes = {"in_channels": 16, "num_layers": 2, "pooled_projection_dim": 4} | changes
    pipe = FluxPipeline(
        tokenizer=_clip_tokenizer(clip_tokens),
        text_encoder=CLIPTextModel(_clip(4, clip_tokens).config).eval(),
        tokenizer_2=T5Tokenizer(vocab=_LETTERS, extra_ids=0),
        text_encoder_2=_t5(),
        vae=_vae(shift=0.1),
        transformer=get_backbone("flux").tiny(**sizes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae(shift: float | None = None, channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=shift,  # type: ignore[arg-type]
    ).eval()


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _clip_tokenizer(tokens: int) -> CLIPTokenizer:
    ends = [f"{letter}</w>" for letter in ascii_lowercase]
    words = [*ascii_lowercase, *ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[], model_max_length=tokens)


def _clip(channels: int, tokens: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=channels,
        intermediate_size=8,
        projection_dim=3,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=52,
        eos_token_id=53,
    )
    return CLIPTextModelWithProjection(config).eval()


def pictures(pipe: Any, prompts: tuple[str, ...] = ("a cat", "two dogs"), **options: Any) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1]; the same noise every time."""
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "num_inference_steps": 5,
        "guidance_scale": 4.5,
        "max_sequence_length": TEXT,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "pt",
    }
    if isinstance(pipe, FluxPipeline):  # its own default is 1024 x 1024 pixels, whatever the transformer
        settings |= {"height": 16, "width": 16}
    elif not isinstance(pipe, StableDiffusion3Pipeline):
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    images = pipe(list(prompts), **(settings | options)).images
    assert isinstance(images, torch.Tensor)
    return images
