"""The pipeline of text-conditional transformers that work on pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from diffratio.conditions import EncoderId, EncoderSet, TextEncoder, encode_captions, text_encoder
from diffratio.errors import DiffratioError
from diffratio.sampling.pipeline import FamilyPipeline

_KEPT = 4096  # prompts whose states are kept
_KEPT_TOKENS = 1 << 20  # of them together


class PixelTextPipeline(FamilyPipeline):
    """Samples a text-conditional transformer that works on pixels; saves and loads as any diffusers pipeline.

    The text encoder, or the set of them, is not stored along: it is named, and loaded when the first prompt comes.

    Args:
        transformer: of a text-conditional family, routed or not, in evaluation mode.
        scheduler: what `make_scheduler` returns, or any diffusers scheduler of the model's objective.
        text: name, revision, tokens and width of the text encoder, and channels of the pooled state of a set.

    Attributes:
        prompts: what `generate` asks for in turn where it is given none.
    """

    _asked = "prompts"

    def __init__(self, transformer: Any, scheduler: Any, text: Mapping[str, Any]) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(text=dict(text))
        self.text = EncoderId(**text)
        self.prompts: tuple[str, ...] = ()
        self._encoder: TextEncoder | EncoderSet | None = None
        self._known: dict[str, dict[str, Tensor]] = {}

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The transformer's arguments for prompts (B entries each); those seen lately are not encoded again.

        Raises:
            DiffratioError: the encoder is not here, or is of another revision than the model was trained on.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            if self._encoder is None:
                self._encoder = text_encoder(self.text.name, self.text.tokens)
                if self._encoder.identity != self.text:
                    found, self._encoder = self._encoder.identity, None
                    raise DiffratioError(
                        f"this model reads text of {self.text}, and what is here is {found}; install that revision"
                    )
            if len(self._known) + len(new) > min(_KEPT, _KEPT_TOKENS // self.text.tokens):
                self._known = {prompt: one for prompt, one in self._known.items() if prompt in prompts}
            # as in training, where states are kept in half precision
            together = encode_captions(new, self._encoder).arguments(torch.arange(len(new)))
            for row, prompt in enumerate(new):
                self._known[prompt] = {key: one[row] for key, one in together.items()}
        found_here = [self._known[prompt] for prompt in prompts]
        return {key: torch.stack([one[key] for one in found_here]) for key in found_here[0]}

    def __call__(
        self,
        prompt: str | Sequence[str],
        guidance_scale: float = 2.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask: Any = None,
        paste: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples one picture for each prompt.

        Args:
            prompt: B prompts, or one.
            guidance_scale: classifier-free guidance; higher follows the prompt more closely. At 1 or below only the
                conditional half is evaluated, otherwise both, unconditional first.
            num_inference_steps: evaluated steps S.
            generator: source of the initial noise, and of step noise where the scheduler draws it; a list holds one
                for each sample.
            latents: initial noise (B, C, H, W) of unit variance instead of a draw; square, H a multiple of the patch.
            output_type: `pil`, `np` (B, H, W, C) or `pt` (B, C, H, W), both float32 in [0, 1].
            return_dict: False gives a tuple.
            negative_prompt: what guidance leads away from, one for all or one for each; None is the empty prompt.
            image: of an inpainting model, what is known: (B, C, H, W) in [-1, 1], PIL pictures, or one for all.
            mask: where it is not: (B, 1, H, W), 1 in the hole, or PIL pictures, white in the hole, or one for all.
            paste: whether the known pixels replace the sampled ones outside the hole.

        Returns:
            The pictures as `.images`, or a tuple of them.

        Raises:
            DiffratioError: no prompt, latents, steps, output type, picture or mask that do not fit, or a transformer in
                training mode.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(one, str) for one in prompts):
            raise DiffratioError(f"prompt must be a text or a list of texts, got {prompt!r}")
        against: list[Any] = (
            list(negative_prompt) if isinstance(negative_prompt, list | tuple) else [negative_prompt or ""]
        )
        against = against * len(prompts) if len(against) == 1 else against
        if len(against) != len(prompts) or not all(isinstance(one, str) for one in against):
            raise DiffratioError(
                f"negative_prompt {negative_prompt!r} for {len(prompts)} prompts: give one text, or one for each"
            )

        shared = (guidance_scale, num_inference_steps, generator, latents, output_type, return_dict, image, mask, paste)
        return self._sample(
            len(prompts),
            lambda device: self.encode(prompts),
            lambda device: self.encode(against),
            *shared,
        )
