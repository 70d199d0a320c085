"""Pipelines in pixel space, and of class-conditional transformers; those in latent space are diffusers' own."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import image_channels, inpaints
from diffratio.conditions import EncoderId
from diffratio.cost.run import Halves
from diffratio.errors import DiffratioError, unknown
from diffratio.inpainting import Known
from diffratio.sampling.known import known_of
from diffratio.sampling.schedulers import is_flow, model_timesteps, set_steps, takes_variance

OUTPUT_TYPES = ("pil", "np", "pt")


def label_ids(labels: Sequence[int | str], named: Mapping[str, int], null: int) -> list[int]:
    """Class numbers of class names and numbers.

    Args:
        labels: of `named`, or numbers from 0 to the null label.
        named: number of every class name; may be empty.
        null: the null label, which is as many as there are classes.

    Raises:
        DiffratioError: an unknown name, or a number out of range.
    """
    return [_label_id(label, named, null) for label in labels]


def _label_id(label: int | str, named: Mapping[str, int], null: int) -> int:
    if isinstance(label, str):
        if label in named:
            return named[label]
        if not named:
            raise DiffratioError(f"class {label!r}: this pipeline has no class names; give numbers 0 to {null - 1}")
        raise unknown("class", label, named)
    try:
        number = operator.index(label)
    except TypeError:
        raise DiffratioError(f"class labels are numbers or names, got {label!r}") from None
    if not 0 <= number <= null:
        raise DiffratioError(f"class {number} is out of range: give 0 to {null - 1} ({null} is no class)")
    return number


class PixelPipeline(DiffusionPipeline):
    """The loop of pipelines whose transformer works on pixels.

    Attributes:
        guidance_order: how a batch holds the guidance halves.
        known: pictures and masks that `generate` takes in turn where it is given none, of inpainting models.
        asked: classes that `generate` asks for in turn where it is given none; empty takes all classes in turn.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]
    guidance_order: ClassVar[Halves] = "cond_first"
    _asked: ClassVar[str] = "samples"
    transformer: Any
    scheduler: Any
    known: Known | None = None
    asked: tuple[int, ...] = ()

    @torch.no_grad()
    def _sample(
        self,
        batch: int,
        condition: Callable[[torch.device], Mapping[str, Tensor]],
        no_condition: Callable[[torch.device], Mapping[str, Tensor]],
        guidance_scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
        image: Any,
        mask: Any,
        paste: bool,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples `batch` pictures; the two functions give the transformer's arguments of either guidance half."""
        known = known_of(self.transformer, image, mask, batch)
        if output_type not in OUTPUT_TYPES:
            raise unknown("output_type", output_type, OUTPUT_TYPES)
        if self.transformer.training:
            raise DiffratioError(
                "the transformer is in training mode, in which some families drop conditions at random: "
                "call pipe.transformer.eval() before sampling"
            )
        if isinstance(generator, list) and len(generator) != batch:
            raise DiffratioError(f"{len(generator)} generators for {batch} {self._asked}: give one for each")
        device = self._execution_device
        scale_input = self._scale_input(guidance_scale, batch)
        if self.guidance_order == "one":  # the scale is an input, if anything
            guidance_scale = 1.0
        guided = guidance_scale > 1
        arguments = self._placed(condition(device), device) | scale_input
        if guided:
            other = self._placed(no_condition(device), device)
            first, second = (arguments, other) if self.guidance_order == "cond_first" else (other, arguments)
            arguments = {key: torch.cat([first[key], second[key]]) for key in arguments}  # (2B, ...)

        # The scheduler keeps its timesteps on the host: its steps then read plain numbers and never wait for a device.
        set_steps(self.scheduler, num_inference_steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        x = self._prepare_latents(batch, generator, latents, device, known)  # (B, C, H, W) float32
        if known is not None:
            known = known.to(device)
            shown = known.channels.to(self.transformer.dtype)  # (B, C + 1, H, W), the same at every step
        times = self._model_time(model_timesteps(self.scheduler)).to(device)
        extra = {"generator": generator} if self._step_takes("generator") else {}
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            model_input = model_input.to(self.transformer.dtype)
            if known is not None:
                model_input = torch.cat([model_input, shown], dim=1)
            if guided:
                model_input = torch.cat([model_input, model_input])
            timestep = times[step].expand(len(model_input))
            output = self._predict(model_input, timestep, arguments)
            prediction = self._guide(output.float(), x.shape[1], guidance_scale)
            x = self.scheduler.step(prediction, t, x, **extra, return_dict=False)[0]

        if known is not None and paste:
            x = known.pasted(x)
        images = self.decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _placed(self, arguments: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Arguments where the transformer is, floating ones in its computing type."""
        dtype = self.transformer.dtype
        return {key: one.to(device, dtype if one.is_floating_point() else None) for key, one in arguments.items()}

    def _scale_input(self, guidance_scale: float, batch: int) -> dict[str, Tensor]:
        """The argument that tells the transformer the guidance scale, where it has one."""
        return {}

    def _model_time(self, timesteps: Tensor) -> Tensor:
        """A scheduler's timesteps as the transformer takes them."""
        return timesteps

    def _predict(self, inputs: Tensor, timestep: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The transformer's output, (B or 2B, C or 2C, H, W)."""
        output: Tensor = self.transformer(inputs, timestep=timestep, **arguments, return_dict=False)[0]
        return output

    def decode(self, x: Tensor, output_type: str = "pt") -> Any:
        """Pictures of samples.

        Args:
            x: (B, C, H, W), nominally in [-1, 1]; clamped.
            output_type: `pil`, `np` or `pt`.

        Returns:
            Pictures; arrays and tensors are float32 in [0, 1].
        """
        pictures = x.float().clamp(-1, 1) / 2 + 0.5
        if output_type == "pt":
            return pictures
        array = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
        known: Known | None,
    ) -> Tensor:
        backbone, config = backbone_of(self.transformer), self.transformer.config
        channels, multiple = image_channels(self.transformer), backbone.fold * config.patch_size
        size = (backbone.sample_side(self.transformer),) * 2 if latents is None else tuple(latents.shape[-2:])
        if known is not None and tuple(known.images.shape[2:]) != size:
            height, width = known.images.shape[2:]
            raise DiffratioError(
                f"the picture to inpaint is {height}x{width} and the sample is {'x'.join(map(str, size))}; scale the "
                "picture and its mask to the sample's size"
            )
        if latents is None:
            shape = (batch, channels, *size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif (
            latents.ndim != 4
            or latents.shape[:2] != (batch, channels)
            or latents.shape[2] != latents.shape[3]
            or latents.shape[3] % multiple
        ):
            raise DiffratioError(
                f"latents of shape {tuple(latents.shape)} do not fit: give ({batch}, {channels}, H, H) "
                f"with H a multiple of {multiple}"
            )
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _guide(self, output: Tensor, channels: int, guidance_scale: float) -> Tensor:
        """Combines the halves of (B or 2B, C or 2C, H, W) to what the scheduler takes, (B, C or 2C, H, W).

        Only the mean is guided; a learned variance is the conditional half's.
        """
        learned = output.shape[1] == 2 * channels
        mean = output[:, :channels]
        if guidance_scale > 1:
            conditional, unconditional = mean.chunk(2)[:: 1 if self.guidance_order == "cond_first" else -1]
            mean = unconditional + guidance_scale * (conditional - unconditional)
        if not takes_variance(self.scheduler):
            return mean
        if not learned:
            raise DiffratioError(
                "the scheduler expects a learned variance and the transformer predicts none "
                f"({output.shape[1]} channels for {channels}): choose variance_type='fixed_small'"
            )
        variance = output[:, channels:]
        if guidance_scale > 1 and self.guidance_order != "cond_first":
            variance = variance[len(mean) :]
        return torch.cat([mean, variance[: len(mean)]], dim=1)

    def _step_takes(self, argument: str) -> bool:
        # Looked up along the class's bases: a subclass may pass its arguments on unnamed.
        steps = (base.__dict__["step"] for base in type(self.scheduler).__mro__ if "step" in base.__dict__)
        return any(argument in inspect.signature(step).parameters for step in steps)


class FamilyPipeline(PixelPipeline):
    """A loop for any known family, as its backbone says: how it is called, and how it batches the guidance halves."""

    @property
    def guidance_order(self) -> Halves:  # type: ignore[override]
        """As the family's own pipelines have it."""
        return backbone_of(self.transformer).guidance_order

    def _scale_input(self, guidance_scale: float, batch: int) -> dict[str, Tensor]:
        """Of families whose guidance is no second half."""
        return backbone_of(self.transformer).scale_input(self.transformer, guidance_scale, batch)

    def _model_time(self, timesteps: Tensor) -> Tensor:
        """As the family's own pipelines do it."""
        return backbone_of(self.transformer).model_time(timesteps)

    def _predict(self, inputs: Tensor, timestep: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """As in training, where some families are told the size of the sample, too."""
        return backbone_of(self.transformer).predict(self.transformer, inputs, timestep, arguments)


class PixelDiTPipeline(PixelPipeline):
    """Samples a class-conditional transformer that works on pixels; saves and loads as any diffusers pipeline.

    Args:
        transformer: a `DiTTransformer2DModel`, routed or not, in evaluation mode; its null label (for guidance) is
            `config.num_embeds_ada_norm`.
        scheduler: what `make_scheduler` returns, or any diffusers scheduler of the model's objective.
        id2label: class names by class number; a name may list synonyms, separated by commas.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffratio.sampling.schedulers import make_scheduler
        >>> tiny = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1,
        ...     num_layers=1, sample_size=8, num_embeds_ada_norm=10).eval()
        >>> pipe = PixelDiTPipeline(tiny, make_scheduler("flow_euler"))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe([3, 7], num_inference_steps=2, output_type="pt").images.shape
        torch.Size([2, 1, 8, 8])
    """

    _asked = "class labels"

    def __init__(self, transformer: Any, scheduler: Any, id2label: Mapping[Any, str] | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        # JSON has no integer keys: the same form is kept before and after a save.
        names = None if id2label is None else {str(key): name for key, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.labels = {part.strip(): int(key) for key, name in (names or {}).items() for part in name.split(",")}

    def get_label_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Class numbers of class names and numbers.

        Args:
            labels: names of `id2label`, or numbers from 0 to the null label.

        Returns:
            As many class numbers.

        Raises:
            DiffratioError: an unknown name, or a number out of range.
        """
        return label_ids(labels, self.labels, self.transformer.config.num_embeds_ada_norm)

    def __call__(
        self,
        class_labels: Sequence[int | str],
        guidance_scale: float = 2.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        image: Any = None,
        mask: Any = None,
        paste: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples one picture for each label.

        Args:
            class_labels: B class numbers or names.
            guidance_scale: classifier-free guidance; higher follows the class more closely. At 1 or below only the
                conditional half is evaluated, otherwise both, conditional first.
            num_inference_steps: evaluated steps S.
            generator: source of the initial noise, and of step noise where the scheduler draws it; a list holds one
                for each sample.
            latents: initial noise (B, C, H, W) of unit variance instead of a draw; square, H a multiple of the patch.
            output_type: `pil`, `np` (B, H, W, C) or `pt` (B, C, H, W), both float32 in [0, 1].
            return_dict: False gives a tuple.
            image: of an inpainting model, what is known: (B, C, H, W) in [-1, 1], PIL pictures, or one for all.
            mask: where it is not: (B, 1, H, W), 1 in the hole, or PIL pictures, white in the hole, or one for all.
            paste: whether the known pixels replace the sampled ones outside the hole.

        Returns:
            The pictures as `.images`, or a tuple of them.

        Raises:
            DiffratioError: labels, latents, steps, output type, picture or mask that do not fit, or a transformer in
                training mode.
        """
        numbers = self.get_label_ids(class_labels)
        if not numbers:
            raise DiffratioError("class_labels is empty: give at least one class")

        def condition(device: torch.device) -> dict[str, Tensor]:
            return {"class_labels": torch.tensor(numbers, device=device)}

        def no_condition(device: torch.device) -> dict[str, Tensor]:
            null = self.transformer.config.num_embeds_ada_norm
            return {"class_labels": torch.full((len(numbers),), null, device=device)}

        shared = (guidance_scale, num_inference_steps, generator, latents, output_type, return_dict, image, mask, paste)
        return self._sample(len(numbers), condition, no_condition, *shared)


def build_pipeline(
    transformer: Any,
    scheduler: Any,
    vae: Any | None = None,
    id2label: Mapping[Any, str] | None = None,
    text: EncoderId | None = None,
) -> Any:
    """The pipeline of a class-conditional transformer, or of a text-conditional one in pixel space.

    Args:
        transformer: a `DiTTransformer2DModel`, routed or not; with `text` one of a text-conditional family.
        scheduler: what `make_scheduler` returns.
        vae: decoder of a latent model; None for a pixel model.
        id2label: class names by class number.
        text: encoder of the prompts.

    Returns:
        `PixelDiTPipeline`, `PixelTextPipeline`, or diffusers' `DiTPipeline` where there is a VAE.

    Raises:
        DiffratioError: a latent model that DiTPipeline would sample wrongly.
    """
    if text is not None:
        from diffratio.sampling.text import PixelTextPipeline

        return PixelTextPipeline(transformer, scheduler, text.to_json())
    if vae is None:
        return PixelDiTPipeline(transformer, scheduler, id2label)
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    if inpaints(transformer):
        raise DiffratioError(
            "diffusers' DiTPipeline shows a transformer no masks: an inpainting model is sampled in pixel space alone, "
            "without a VAE"
        )
    if is_flow(scheduler):
        raise DiffratioError(
            "diffusers' DiTPipeline samples noise prediction only: for a latent model choose sampler ddpm, ddim or "
            "dpm_solver with objective 'noise'"
        )
    null = transformer.config.num_embeds_ada_norm
    if null != 1000:
        raise DiffratioError(
            f"diffusers' DiTPipeline takes 1000 as the null label and this transformer has {null}: "
            "a latent model needs 1000 classes; without a VAE any number works"
        )
    names = None if id2label is None else {int(key): name for key, name in id2label.items()}
    return DiTPipeline(transformer, vae, scheduler, id2label=names)
