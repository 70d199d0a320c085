from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from diffratio.errors import DiffratioError
from diffratio.sampling.generate import initial_noise, sample_generator
from diffratio.sampling.pipeline import PixelDiTPipeline, build_pipeline
from diffratio.sampling.schedulers import make_scheduler, objective_of


class Oracle(DiTTransformer2DModel):  # type: ignore[misc]
    """A DiT whose prediction is a known function; records what it is called with."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, predict: Any, channels: int = 1, size: int = 8) -> None:
        nn.Module.__init__(self)
        self.predict = predict
        self._internal_dict = SimpleNamespace(
            in_channels=channels, sample_size=size, patch_size=2, num_embeds_ada_norm=10
        )
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.eval()

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.calls.append((x, timestep, class_labels))
        return (self.predict(x, timestep, class_labels),)


def oracle_pipe(predict: Any, scheduler: Any, **options: Any) -> Any:
    pipe = PixelDiTPipeline(Oracle(predict, **options), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


NOISE = initial_noise(0, range(3), (1, 8, 8))


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_known_clean_image_is_reached_whatever_the_steps(steps: int) -> None:
    clean = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8).expand(3, -1, -1, -1)
    scheduler = make_scheduler("dpm_solver", "flow_sample")
    pipe = oracle_pipe(lambda x, t, y: clean, scheduler)
    images = pipe([0, 1, 2], 1.0, steps, latents=NOISE, output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, clean, atol=2e-6, rtol=0)
    first, last = pipe.transformer.calls[0], pipe.transformer.calls[-1]
    assert first[1][0] == pytest.approx(1000, rel=2e-3) and objective_of(scheduler) == "flow_sample"
    # between, the sample lies on the straight path
    level = float(last[1][0]) / 1000
    torch.testing.assert_close(last[0], (1 - level) * clean + level * NOISE, atol=5e-3, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_solves_a_constant_velocity_exactly(steps: int, shift: float) -> None:
    clean = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8).expand(3, -1, -1, -1)
    pipe = oracle_pipe(lambda x, t, y: NOISE - clean, make_scheduler("flow_euler", shift=shift))
    images = pipe([0, 1, 2], 1.0, steps, latents=NOISE, output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, clean, atol=2e-6, rtol=0)
    assert len(pipe.transformer.calls) == steps
    assert pipe.transformer.calls[0][1].tolist() == [1000.0] * 3


@pytest.mark.parametrize(("sampler", "objective"), [("ddim", "noise"), ("dpm_solver", "noise"), ("dpm_solver", "flow")])
def test_samplers_find_the_one_picture_that_an_exact_model_knows(sampler: str, objective: str) -> None:
    clean = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8)
    scheduler = make_scheduler(sampler, objective)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if objective == "flow":
            return (x - clean) / (t / 1000).reshape(-1, 1, 1, 1)
        alpha = scheduler.alphas_cumprod[t.long()].reshape(-1, 1, 1, 1)
        return (x - alpha**0.5 * clean) / (1 - alpha) ** 0.5

    images = oracle_pipe(predict, scheduler)([0, 1, 2], 1.0, 20, latents=NOISE, output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, clean.expand(3, -1, -1, -1), atol=1e-3, rtol=0)


def test_guidance_puts_the_conditional_half_first_and_extrapolates() -> None:
    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x) + y.reshape(-1, 1, 1, 1) / 10

    pipe = oracle_pipe(predict, make_scheduler("flow_euler"))
    (images,) = pipe([2, 5], 3.0, 2, latents=torch.full((2, 1, 8, 8), 0.5), output_type="pt", return_dict=False)
    labels = pipe.transformer.calls[0][2]
    assert labels.tolist() == [2, 5, 10, 10]
    # velocity 1 + 3 (y/10 - 1), integrated over one unit of time
    expected = torch.tensor([0.5 - (1 + 3 * (0.2 - 1)), 0.5 - (1 + 3 * (0.5 - 1))]).clamp(-1, 1)
    torch.testing.assert_close(images.mean((1, 2, 3)) * 2 - 1, expected)


def test_guidance_scale_one_is_the_conditional_half_alone(dit: Any) -> None:
    pipe = quiet(PixelDiTPipeline(dit, make_scheduler("flow_euler")))
    shapes: list[int] = []
    hook = dit.register_forward_hook(lambda module, arguments, output: shapes.append(arguments[0].shape[0]))
    one = pipe([1, 2, 3], 1.0, 4, latents=NOISE, output_type="pt").images
    assert shapes == [3] * 4
    near = pipe([1, 2, 3], 1.0 + 1e-6, 4, latents=NOISE, output_type="pt").images
    assert shapes[4:] == [6] * 4
    hook.remove()
    torch.testing.assert_close(near, one, atol=1e-4, rtol=0)
    x = NOISE
    with torch.no_grad():
        for i in range(4):
            t = torch.full((3,), 1000.0 * (4 - i) / 4)
            x = x - dit(x, timestep=t, class_labels=torch.tensor([1, 2, 3])).sample / 4
    torch.testing.assert_close(one * 2 - 1, x.clamp(-1, 1), atol=1e-5, rtol=0)
    assert (pipe([1, 2, 3], 4.0, 4, latents=NOISE, output_type="pt").images - one).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_learned_variance_reaches_ddpm_unguided(guidance_scale: float, tiny_dit: Any) -> None:
    pipe = quiet(PixelDiTPipeline(tiny_dit(2), make_scheduler("ddpm", "noise", variance_type="learned_range")))
    seen: list[Tensor] = []
    raw: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(output: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(output)
        return step(output, *rest, **named)

    pipe.scheduler.step = watched
    pipe.transformer.register_forward_hook(lambda module, arguments, output: raw.append(output[0]))
    images = pipe([1, 2, 3], guidance_scale, 3, torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (3, 1, 8, 8) and images.isfinite().all()
    assert len(seen) == 3
    for taken, output in zip(seen, raw, strict=True):
        mean = output[:3, :1]
        if guidance_scale > 1:
            mean = output[3:, :1] + guidance_scale * (mean - output[3:, :1])
        torch.testing.assert_close(taken, torch.cat([mean, output[:3, 1:]], 1))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_a_learned_variance_is_dropped_for_the_others(sampler: str, tiny_dit: Any) -> None:
    transformer = tiny_dit(2)
    pipe = quiet(PixelDiTPipeline(transformer, make_scheduler(sampler, "noise")))

    def run() -> Tensor:
        return pipe([1], 2.0, 4, sample_generator(0, 0), output_type="pt").images

    before = run()
    with torch.no_grad():
        weight, bias = transformer.proj_out_2.weight, transformer.proj_out_2.bias  # rows: (patch, patch, channel)
        weight.view(4, 2, -1)[:, 1] += 1.0
        bias.view(4, 2)[:, 1] += 1.0
    torch.testing.assert_close(run(), before)
    with torch.no_grad():
        bias.view(4, 2)[:, 0] += 1.0
    assert (run() - before).abs().max() > 1e-3


def test_a_missing_variance_is_an_error(dit: Any) -> None:
    pipe = quiet(PixelDiTPipeline(dit, make_scheduler("ddpm", "noise", variance_type="learned_range")))
    with pytest.raises(DiffratioError, match="fixed_small"):
        pipe([1], num_inference_steps=1)


def test_save_and_load(dit: Any, tmp_path: Path) -> None:
    names = {i: f"thing {i}" for i in range(9)} | {9: "boot, ankle boot"}
    pipe = quiet(PixelDiTPipeline(dit, make_scheduler("flow_euler", shift=2.0), names))
    pipe.save_pretrained(tmp_path)
    again = quiet(PixelDiTPipeline.from_pretrained(tmp_path))
    assert again.scheduler.config.shift == 2.0 and again.config.id2label == pipe.config.id2label
    assert again.get_label_ids(["ankle boot", "boot", 3]) == [9, 9, 3]
    expected = pipe(["boot"], latents=NOISE[:1], num_inference_steps=3, output_type="np").images
    assert (again([9], latents=NOISE[:1], num_inference_steps=3, output_type="np").images == expected).all()
    again.save_pretrained(tmp_path / "twice")
    assert PixelDiTPipeline.from_pretrained(tmp_path / "twice").labels == pipe.labels


def test_output_types_agree(dit: Any) -> None:
    pipe = quiet(PixelDiTPipeline(dit, make_scheduler("flow_euler")))
    pt, array, pil = (pipe([1, 2], 2.0, 2, latents=NOISE[:2], output_type=kind).images for kind in ("pt", "np", "pil"))
    assert pt.dtype == torch.float32 and pt.min() >= 0 and pt.max() <= 1
    assert array.shape == (2, 8, 8, 1) and (array[..., 0] == pt[:, 0].numpy()).all()
    assert [picture.mode for picture in pil] == ["L", "L"] and pil[0].size == (8, 8)
    assert pil[1].getpixel((3, 5)) == round(float(pt[1, 0, 5, 3]) * 255)


def test_other_sizes_and_precisions(dit: Any) -> None:
    pipe = quiet(PixelDiTPipeline(dit, make_scheduler("flow_euler")))
    assert pipe([1], latents=torch.randn(1, 1, 12, 12), num_inference_steps=1, output_type="pt").images.shape[-1] == 12
    full = pipe([1], latents=NOISE[:1], num_inference_steps=3, output_type="pt").images
    half = quiet(pipe.to(torch.bfloat16))([1], latents=NOISE[:1], num_inference_steps=3, output_type="pt").images
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0)


def test_the_scheduler_is_called_once_a_run_and_once_a_step(dit: Any) -> None:
    scheduler = make_scheduler("ddpm", "noise")
    calls: list[str] = []

    class Following(DDPMScheduler):
        def set_timesteps(self, *arguments: Any, **named: Any) -> Any:
            calls.append("open")
            return super().set_timesteps(*arguments, **named)

        def step(self, *arguments: Any, **named: Any) -> Any:  # hides the generator argument
            calls.append("step")
            assert named["generator"] is not None
            return super().step(*arguments, **named)

    scheduler.__class__ = Following
    quiet(PixelDiTPipeline(dit, scheduler))([1], 2.0, 3, torch.Generator().manual_seed(1))
    assert calls == ["open", "step", "step", "step"]


def test_bad_input(dit: Any) -> None:
    pipe = quiet(PixelDiTPipeline(dit, make_scheduler("flow_euler"), {0: "trouser", 1: "sandal"}))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"class_labels": ["trousers"]}, "did you mean trouser"),
        ({"class_labels": [11]}, "0 to 9"),
        ({"class_labels": [-1]}, "0 to 9"),
        ({"class_labels": [0.5]}, "numbers or names"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": [0], "output_type": "jpg"}, "unknown output_type"),
        ({"class_labels": [0], "latents": torch.zeros(2, 1, 8, 8)}, "do not fit"),
        ({"class_labels": [0], "latents": torch.zeros(1, 1, 8, 6)}, "do not fit"),
        ({"class_labels": [0], "latents": torch.zeros(1, 1, 7, 7)}, "multiple of 2"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2"),
        ({"class_labels": [0], "num_inference_steps": 0}, "from 1 to 1000"),
    ]
    for arguments, says in cases:
        with pytest.raises(DiffratioError, match=says):
            pipe(**arguments)
    with pytest.raises(DiffratioError, match="no class names"):
        PixelDiTPipeline(dit, make_scheduler("flow_euler"))(["boot"])
    dit.train()
    with pytest.raises(DiffratioError, match="training mode"):
        pipe([0])


def test_build_pipeline_picks_by_vae(tiny_dit: Any) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1
    )
    latent = tiny_dit(4, classes=1000, channels=4)
    pipe = build_pipeline(latent, make_scheduler("ddim", "noise"), vae, {"3": "shark"})
    assert pipe.get_label_ids(["shark"]) == [3]
    assert isinstance(pipe, DiTPipeline)
    assert isinstance(build_pipeline(tiny_dit(), make_scheduler("flow_euler")), PixelDiTPipeline)
    for sampler in ("flow_euler", "dpm_solver"):
        with pytest.raises(DiffratioError, match="objective 'noise'"):
            build_pipeline(latent, make_scheduler(sampler, "flow"), vae)
    with pytest.raises(DiffratioError, match="1000 as the null label"):
        build_pipeline(tiny_dit(4, channels=4), make_scheduler("ddim", "noise"), vae)
