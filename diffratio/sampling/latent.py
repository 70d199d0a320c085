"""A pipeline over conditions by number and a VAE: samples of a training run, without its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from diffratio.conditions import Conditions
from diffratio.errors import DiffratioError
from diffratio.sampling.pipeline import FamilyPipeline
from diffratio.sampling.vae import LatentCoder


class LatentPipeline(FamilyPipeline):
    """Samples a transformer that works on latents, for conditions by number; made by `latent_pipeline`, never saved."""

    _asked = "conditions"
    coder: LatentCoder  # these two are no parts of a diffusers pipeline, so its constructor must not name them
    conditions: Conditions

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def decode(self, x: Tensor, output_type: str = "pt") -> Any:
        """Pictures of scaled latents (B, C, h, w); see `PixelPipeline.decode`."""
        return super().decode(self.coder.decode(x), output_type)

    def __call__(
        self,
        labels: Sequence[int],
        guidance_scale: float = 2.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples one picture for each condition.

        Args:
            labels: B numbers of conditions.
            guidance_scale: classifier-free guidance; higher follows the condition more closely, 1 or below is none.
            num_inference_steps: evaluated steps.
            generator: source of the noise; a list holds one for each sample.
            latents: initial noise (B, C, h, w) instead of a draw.
            output_type: `pil`, `np` or `pt`.
            return_dict: False gives a tuple.

        Raises:
            DiffratioError: guidance without a number that means "no condition", or as `PixelPipeline`.
        """
        null = self.conditions.null
        if guidance_scale > 1 and null is None:
            raise DiffratioError("guidance needs a condition that means none, and these have no such number")

        def arguments(numbers: Sequence[int], device: torch.device) -> dict[str, Tensor]:
            return self.conditions.arguments(torch.tensor(numbers, device=device))

        return self._sample(
            len(labels),
            lambda device: arguments(list(labels), device),
            lambda device: arguments([null or 0] * len(labels), device),
            guidance_scale,
            num_inference_steps,
            generator,
            latents,
            output_type,
            return_dict,
            image=None,
            mask=None,
            paste=False,
        )


def latent_pipeline(transformer: Any, scheduler: Any, coder: LatentCoder, conditions: Conditions) -> LatentPipeline:
    """The pipeline of a transformer that works on latents.

    Args:
        transformer: of any family that takes `conditions`' arguments, in evaluation mode.
        scheduler: of the model's objective.
        coder: decodes the samples.
        conditions: what numbers stand for; guidance needs one that means "no condition".
    """
    pipe = LatentPipeline(transformer, scheduler)
    pipe.coder, pipe.conditions = coder, conditions
    return pipe
