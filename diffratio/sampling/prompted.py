"""Samples of diffusers' own text-to-image pipelines, each from its own noise."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.errors import DiffratioError

# switched off where a pipeline has them: prompts stay as they are, and the size is the model's own
_PLAIN = {"clean_caption": False, "use_resolution_binning": False}


def prompted(
    pipe: Any,
    prompts: Sequence[int | str],
    noise: Tensor,
    generators: Sequence[torch.Generator],
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Pictures of prompts.

    Args:
        pipe: a pipeline in latent space with `prompt` and `latents`, attached or not.
        prompts: B texts.
        noise: (B, C, h, w).
        generators: of the noise that steps draw, one for each sample.
        steps: evaluated steps.
        guidance_scale: classifier-free guidance.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        DiffratioError: a prompt that is no text, or a pipeline that takes none.
    """
    # a pipeline that is tied to a method takes any arguments: the class that it was says which
    call = next(one.__dict__["__call__"] for one in type(pipe).__mro__ if _names_arguments(one))
    takes = inspect.signature(call).parameters
    if "prompt" not in takes or "latents" not in takes:
        raise DiffratioError(f"{type(pipe).__name__} takes no prompt with latents; sample it by hand")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DiffratioError(f"a text-conditional model is sampled by prompts, got {prompt!r}")
    options: dict[str, Any] = {key: value for key, value in _PLAIN.items() if key in takes}
    if "max_sequence_length" in takes:
        options["max_sequence_length"] = backbone_of(pipe.transformer).longest_prompt(pipe.transformer)
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
    images: Tensor = pipe(
        prompt=list(prompts),
        height=height,
        width=width,
        latents=noise.to(pipe.transformer.dtype),
        generator=list(generators),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="pt",
        **options,
    ).images
    return images


def _names_arguments(kind: type) -> bool:
    call = kind.__dict__.get("__call__")
    return call is not None and "guidance_scale" in inspect.signature(call).parameters
