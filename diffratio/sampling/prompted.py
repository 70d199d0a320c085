"""Samples of diffusers' own text-to-image pipelines, each from its own noise."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.backbones.base import Backbone
from diffratio.cost.run import Guidance, SamplingRun
from diffratio.errors import DiffratioError
from diffratio.sampling.schedulers import is_flow, noise_levels, set_steps

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
    backbone = backbone_of(pipe.transformer)
    if "max_sequence_length" in takes:
        options["max_sequence_length"] = backbone.longest_prompt(pipe.transformer)
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
    images: Tensor = pipe(
        prompt=list(prompts),
        height=height,
        width=width,
        latents=backbone.packed(noise).to(pipe.transformer.dtype),
        generator=list(generators),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="pt",
        **options,
    ).images
    return images


def prompted_levels(pipe: Any, steps: int) -> tuple[float, ...]:
    """Noise levels that a diffusers pipeline's own call evaluates, in its order.

    Its scheduler is set to them. FLUX's pipeline gives its own levels and a shift that follows the number of tokens,
    SD3's leaves both to the scheduler.

    Args:
        pipe: a text-to-image pipeline.
        steps: evaluated steps.

    Raises:
        DiffratioError: a scheduler whose shift follows the size of the picture in a pipeline that gives it none here.
    """
    scheduler, backbone = pipe.scheduler, backbone_of(pipe.transformer)
    kinds = {one.__name__ for one in type(pipe).__mro__}  # by name: importing both pipelines takes seconds
    if "FluxPipeline" in kinds and is_flow(scheduler):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        sigmas = [(steps - step) / steps for step in range(steps)]
        config, tokens = scheduler.config, backbone.grid(pipe.transformer).tokens
        between = (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096))
        shifts = (config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, *between, *shifts))
    elif "StableDiffusion3Pipeline" in kinds and not scheduler.config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(steps)
    else:
        set_steps(scheduler, steps)
    return noise_levels(scheduler)


def dense_run(pipe: Any, steps: int, guidance_scale: float) -> SamplingRun:
    """The run of a dense pipeline: the levels that it visits, on the model's own grid.

    Args:
        pipe: attached or not.
        steps: evaluated steps.
        guidance_scale: above 1 both guidance halves are evaluated, where the family has them.
    """
    backbone = backbone_of(pipe.transformer)
    guidance: Guidance = "cfg" if guidance_scale > 1 and backbone.guidance_order != "one" else "none"
    grid, text = backbone.grid(pipe.transformer), backbone.text_tokens(pipe.transformer)
    return SamplingRun(prompted_levels(pipe, steps), grid, guidance, text)


def pipeline_guidance(backbone: Backbone) -> float:
    """The guidance scale that the family's usual pipeline takes where it is told none."""
    import diffusers

    call = getattr(diffusers, backbone.pipeline).__call__
    return float(inspect.signature(call).parameters["guidance_scale"].default)


def _names_arguments(kind: type) -> bool:
    call = kind.__dict__.get("__call__")
    return call is not None and "guidance_scale" in inspect.signature(call).parameters
