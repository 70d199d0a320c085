"""A routed checkpoint used in other ways than it was trained: sizes, steps, samplers and image-to-image pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from text_pipelines import PIPELINES, TEXT, pictures, tiny_pipeline

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.cost.macs import tokens_of_bin
from diffratio.cost.run import SamplingRun, region_of
from diffratio.routing.schedule import KeepSchedule
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.schedulers import make_scheduler
from diffratio.surgery import attachment
from diffratio.tokens.grid import TokenGrid

BINS = (3, 6, 8, 10)  # by region, the cleanest first
PICTURE = torch.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
MASK = torch.ones(2, 1, 16, 16)
OTHERS = {
    "sd3 img2img": ("sd3", "StableDiffusion3Img2ImgPipeline"),
    "sd3 inpaint": ("sd3", "StableDiffusion3InpaintPipeline"),
    "flux img2img": ("flux", "FluxImg2ImgPipeline"),
    "flux inpaint": ("flux", "FluxInpaintPipeline"),
}


def scheduled(transformer: Any) -> Any:
    """Routed by regions, as trained for 20 steps on the configured grid, with routers that have an opinion."""
    backbone = backbone_of(transformer)
    layers = len(backbone.blocks(transformer))
    rows = tuple(BINS[layer % 2 :] + BINS[: layer % 2] for layer in range(layers))
    diffratio.apply_(transformer, diffratio.DiffCR(schedule=KeepSchedule(rows, backbone.default_run(transformer, 20))))
    for block in backbone.blocks(transformer):
        torch.nn.init.normal_(block.router.weight)
    return transformer


class Watch:
    """What every forward of a transformer was told, and what it kept."""

    def __init__(self, transformer: Any) -> None:
        self.state = attachment(transformer)
        self.method: Any = self.state.token_method
        self.levels: list[float] = []
        self.told: list[float] = []
        self.steps: list[int | None] = []
        self.runs: list[SamplingRun] = []
        self.kept: list[list[int]] = []
        self.method.kept_index = []
        self.method.end_step = self.end_step
        transformer.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, transformer: Any, args: Any, kwargs: Any) -> None:
        level = self.state.backbone.noise_level(torch.as_tensor(kwargs["timestep"])).reshape(-1)
        assert (level == level[0]).all()
        self.levels.append(float(level[0]))

    def end_step(self, output: Any, ctx: Any) -> None:
        self.told.append(ctx.noise_level)
        self.steps.append(ctx.step)
        self.runs.append(ctx.run)
        self.kept.append([ctx.grid.tokens if one is None else one.shape[1] for one in self.method.kept_index])

    def check(self, forwards: int, grid: TokenGrid) -> None:
        """Levels are those of the timesteps, and every block keeps its bin of the region of the level."""
        assert len(self.levels) == forwards and self.steps == list(range(forwards))
        assert self.told == pytest.approx(self.levels, abs=2e-3)  # timesteps are cut to integers by some samplers
        table = self.method.bins
        for level, kept, run in zip(self.told, self.kept, self.runs, strict=True):
            assert run.grid == grid and run.steps == forwards
            assert kept == [tokens_of_bin(row[region_of(level, len(BINS))], grid.tokens) for row in table]
        assert len({tuple(kept) for kept in self.kept}) > 1
        assert self.state.run is None


@pytest.mark.parametrize(("name", "height", "width", "steps"), [
    ("DPMSolverMultistepScheduler", 24, 16, 5), ("DDIMScheduler", 8, 32, 8), ("EulerDiscreteScheduler", 16, 40, 4),
    ("HeunDiscreteScheduler", 24, 24, 4), ("UniPCMultistepScheduler", 16, 24, 7),
])  # fmt: skip
def test_a_routed_pixart_at_another_size_step_count_and_sampler(name: str, height: int, width: int, steps: int) -> None:
    pipe = tiny_pipeline("sigma")
    pipe.scheduler = getattr(diffusers, name)()
    scheduled(pipe.transformer)
    watch = Watch(diffratio.attach_(pipe).transformer)
    images = pictures(pipe, height=height, width=width, num_inference_steps=steps)
    assert images.shape[-2:] == (height, width) and images.isfinite().all()
    watch.check(2 * steps - 1 if name.startswith("Heun") else steps, TokenGrid(height // 4, width // 4))


@pytest.mark.parametrize(("sampler", "objective", "side", "steps"), [
    ("flow_euler", "flow", 12, 4), ("dpm_solver", "flow", 6, 9), ("dpm_solver", "flow_sample", 12, 9),
    ("ddpm", "noise", 6, 4), ("ddim", "noise", 12, 12),
])  # fmt: skip
def test_a_routed_dit_at_another_size_step_count_and_sampler(
    sampler: str, objective: str, side: int, steps: int
) -> None:
    transformer = scheduled(get_backbone("dit").tiny().eval())  # configured for 8 x 8
    pipe = diffratio.attach_(build_pipeline(transformer, make_scheduler(sampler, objective)))
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(transformer)
    noise = torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    images = pipe([1, 2], 2.0, steps, latents=noise, output_type="pt").images
    assert images.shape == (2, 1, side, side) and images.isfinite().all()
    watch.check(steps, TokenGrid(side // 2, side // 2))


def begun(name: str) -> Any:
    """The text-to-image pipeline; SD3's inpainting takes latents of 16 channels alone."""
    kind = OTHERS[name][0]
    return tiny_pipeline(kind, **({"in_channels": 16, "out_channels": 16} if kind == "sd3" else {}))


def other(name: str, pipe: Any) -> Any:
    """The image-to-image pipeline of the same parts; `from_pipe` takes a routed transformer where it is named."""
    made = getattr(diffusers, OTHERS[name][1]).from_pipe(pipe, transformer=pipe.transformer)
    made.set_progress_bar_config(disable=True)
    return made


def changed(pipe: Any, steps: int = 10, **options: Any) -> torch.Tensor:
    """Pictures on the way from given ones, (2, 3, 16, 16) in [0, 1]; at strength 0.6 by the last 6 steps of 10."""
    settings: dict[str, Any] = {
        "image": PICTURE, "strength": 0.6, "num_inference_steps": steps, "guidance_scale": 4.5, "height": 16,
        "width": 16, "max_sequence_length": TEXT, "generator": torch.Generator().manual_seed(1), "output_type": "pt",
    }  # fmt: skip
    if "Inpaint" in type(pipe).__name__:
        settings["mask_image"] = MASK
    images = pipe(prompt=["a cat", "two dogs"], **(settings | options)).images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.mark.parametrize(("name", "attached_first"), [(name, "img2img" in name) for name in OTHERS])
def test_a_picture_is_changed_by_the_last_steps_alone(name: str, attached_first: bool) -> None:
    """Pipelines open the whole schedule and begin inside it: the levels of a step are those of its timestep."""
    pipe = begun(name)
    dense = changed(other(name, pipe))
    scheduled(pipe.transformer)
    if attached_first:  # the new pipeline takes the scheduler as it is, already tied
        diffratio.attach_(pipe)
    image = diffratio.attach_(other(name, pipe))
    watch = Watch(pipe.transformer)
    found = changed(image)
    watch.check(6, TokenGrid(4, 4))
    assert watch.runs[0].guidance == ("none" if OTHERS[name][0] == "flux" else "cfg")
    assert found.isfinite().all() and not torch.equal(found, dense)
    assert torch.equal(changed(image), found)  # a run leaves nothing behind
    diffratio.remove_(image)
    assert torch.equal(changed(image), dense)


@pytest.mark.parametrize("name", ["sd3 img2img", "flux inpaint"])
def test_methods_with_state_begin_with_the_first_step_that_is_sampled(name: str) -> None:
    pipe = begun(name)
    image = diffratio.attach_(diffratio.apply_(other(name, pipe), diffratio.SDTM()))
    state = attachment(pipe.transformer)
    steps: list[tuple[int | None, int]] = []
    state.token_method.end_step = lambda output, ctx: steps.append((ctx.step, ctx.run.steps))  # type: ignore
    assert changed(image).isfinite().all()
    assert steps == [(step, 6) for step in range(6)]
    text = diffratio.attach_(PIPELINES[OTHERS[name][0]].from_pipe(image, transformer=image.transformer))
    steps.clear()
    assert pictures(text).isfinite().all()
    assert steps == [(step, 5) for step in range(5)]


def test_guidance_is_left_out_of_a_part_of_the_steps_that_are_sampled() -> None:
    pipe = tiny_pipeline("sd3")
    image = diffratio.attach_(diffratio.apply_(other("sd3 img2img", pipe), diffratio.GuidanceInterval(skip=0.5)))
    batches: list[int] = []
    first = backbone_of(pipe.transformer).blocks(pipe.transformer)[0]
    first.register_forward_pre_hook(
        lambda block, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    changed(image)
    assert sorted(batches) == [2, 2, 2, 4, 4, 4]


@pytest.mark.slow  # it imports every pipeline of diffusers
def test_diffusers_chooses_the_image_to_image_pipeline_of_a_routed_one() -> None:
    pipe = begun("flux img2img")
    scheduled(pipe.transformer)
    image = diffratio.attach_(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    assert type(image).__name__ == "FluxImg2ImgPipeline" and image.transformer is pipe.transformer
    watch = Watch(image.transformer)
    changed(image)
    watch.check(6, TokenGrid(4, 4))
