"""Methods that work on the guidance halves: in our pipelines, in diffusers' own, and in loops of one's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler
from every_nth import NOISE, EveryNth, counted, dit, images, pipeline, run_of
from torch import Tensor

import diffratio
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import DiffratioError
from diffratio.methods.guidance_interval import PLACEMENTS
from diffratio.sampling.schedulers import make_scheduler
from diffratio.surgery import attachment
from diffratio.tokens.grid import TokenGrid

STEPS = 6
INTERVAL = diffratio.GuidanceInterval(skip=3)
LITE = diffratio.LiteUncond(keep=0.5)


@torch.no_grad()
def by_hand(guided: list[bool], transformer: Any, scale: float = 2.0) -> Tensor:
    """Pictures of a loop that leaves the unconditional forward out at unguided steps."""
    x, labels, null = NOISE, torch.tensor([1, 2]), torch.tensor([10, 10])
    for i, both in enumerate(guided):
        t = torch.full((2,), 1000.0 * (STEPS - i) / STEPS)
        velocity = transformer(x, t, labels)[0]
        if both:
            unconditional = transformer(x, t, null)[0]
            velocity = unconditional + scale * (velocity - unconditional)
        x = x - velocity / STEPS
    return x.clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unguided_steps_evaluate_the_conditional_half_alone(placement: str) -> None:
    pipe = pipeline(diffratio.GuidanceInterval(skip=3, placement=placement))
    sizes: list[int] = []
    first = pipe.transformer.transformer_blocks[0].norm1
    first.register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[0]))
    found = images(pipe, STEPS)
    guided = attachment(pipe.transformer).methods[0].guided(run_of(pipe, STEPS))
    assert guided is not None and sum(guided) == 3
    assert sizes == [4 if both else 2 for both in guided]
    torch.testing.assert_close(found, by_hand(list(guided), dit()), atol=1e-5, rtol=0)
    assert not torch.allclose(found, images(pipeline(), STEPS), atol=1e-4)


def test_where_guidance_is_kept() -> None:
    run = uniform_run(8, TokenGrid(2, 2))  # levels 1, 7/8, ..., 1/8

    def kept(**settings: Any) -> str:
        config = diffratio.GuidanceInterval(**settings)
        guided = config.method(config, None).guided(run)  # type: ignore[arg-type]
        return "".join("x" if both else "." for both in guided)

    assert kept(skip=3, placement="noisy_first") == "...xxxxx"
    assert kept(skip=3, placement="clean_first") == "xxxxx..."
    assert kept(skip=3, placement="both_ends") == "..xxxxx."
    assert kept(skip=3) == "..xxxxx."
    assert kept(skip=0.5) == "...xxxx."
    assert kept(skip=0.5, centre=1.0) == "xxxx...."
    assert kept(skip=0.5, centre=0.0) == "....xxxx"
    assert (kept(skip=0), kept(skip=1.0), kept(skip=1), kept(skip=99)) == ("x" * 8, "." * 8, ".xxxxxxx", "." * 8)
    shifted = SamplingRun((0.9, 0.88, 0.86, 0.5, 0.3), TokenGrid(2, 2))  # counted by step, or measured by noise level
    ends, middle = (
        diffratio.GuidanceInterval(skip=3, placement=placement) for placement in ("both_ends", "middle_kept")
    )
    for config, expected in ((ends, (False, False, True, True, False)), (middle, (False, False, False, True, True))):
        assert config.method(config, None).guided(shifted) == expected  # type: ignore[arg-type]
    assert middle.order(shifted.noise_levels) == [0, 1, 2, 4, 3]
    already = SamplingRun(run.noise_levels, run.grid, guided=(True,) * 7 + (False,))
    config = diffratio.GuidanceInterval(skip=1)
    assert config.method(config, None).guided(already) == (False, *(True,) * 6, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [diffratio.GuidanceInterval(), diffratio.LiteUncond(), diffratio.ToDo()], ids=repr)
def test_nothing_left_out_is_the_untouched_pipeline(config: Any) -> None:
    assert torch.equal(images(pipeline(config)), images(pipeline()))


@pytest.mark.parametrize("config", [INTERVAL, LITE, diffratio.ToDo(factor=2)], ids=repr)
def test_macs_repeat_batch_and_remove(config: Any) -> None:
    pipe = pipeline(config)
    cost = diffratio.macs(pipe.transformer, run=run_of(pipe))
    assert counted(pipe) == pytest.approx(cost.total, rel=1e-3)
    first = images(pipe)
    images(pipe, 4, noise=NOISE.flip(0))
    assert torch.equal(images(pipe), first)
    for i in range(2):
        alone = images(pipe, noise=NOISE[i : i + 1], labels=[i + 1])
        torch.testing.assert_close(alone[0], first[i], atol=1e-5, rtol=0)
    diffratio.remove_(pipe)
    assert torch.equal(images(pipe), images(pipeline()))


def latent_pipeline(channels: int) -> Any:
    """diffusers' own, with or without a learned variance."""
    from diffusers import AutoencoderKL

    transformer = dit(in_channels=4, out_channels=channels, num_embeds_ada_norm=1000)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, layers_per_block=1
    )
    pipe = DiTPipeline(transformer, vae.eval(), make_scheduler("ddim", "noise"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_images(pipe: Any, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe([1, 2], scale, generator, num_inference_steps=4, output_type="pt").images
    assert isinstance(images, Tensor)
    return images


@pytest.mark.parametrize("channels", [4, 8])
def test_diffusers_own_pipeline_skips_the_unconditional_half(channels: int) -> None:
    pipe, plain = latent_pipeline(channels), latent_images(latent_pipeline(channels))
    conditional = latent_images(latent_pipeline(channels), 1.0)
    sizes: list[int] = []
    diffratio.apply_(pipe, diffratio.GuidanceInterval(skip=1.0))
    diffratio.attach_(pipe)
    assert isinstance(pipe, DiTPipeline) and type(pipe).__name__ == "DiTPipeline"
    hook = pipe.transformer.transformer_blocks[0].norm1.register_forward_hook(
        lambda _, args, out: sizes.append(args[0].shape[0])
    )
    torch.testing.assert_close(latent_images(pipe), conditional, atol=1e-4, rtol=0)
    assert sizes == [2] * 4 and not torch.allclose(plain, conditional, atol=1e-3)
    hook.remove()
    diffratio.remove_(pipe)
    assert type(pipe) is DiTPipeline and torch.equal(latent_images(pipe), plain)
    for config in (diffratio.GuidanceInterval(), diffratio.LiteUncond()):
        diffratio.attach_(diffratio.apply_(pipe, config))
        assert torch.equal(latent_images(pipe), plain)
        diffratio.remove_(pipe)


def loop_output(order: str, config: Any, step: int = 1) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional prediction of one step of a loop of one's own."""
    pipe = SimpleNamespace(transformer=diffratio.apply_(dit(), config), scheduler=FlowMatchEulerDiscreteScheduler())
    diffratio.attach_(pipe, halves=order)  # type: ignore[arg-type]
    pipe.scheduler.set_timesteps(4)
    state = attachment(pipe.transformer)
    state.step = step
    t, labels, null = pipe.scheduler.timesteps[step].expand(2), torch.tensor([1, 2]), torch.tensor([10, 10])
    with torch.no_grad():
        if order in ("cond_first", "uncond_first"):
            pair = (labels, null) if order == "cond_first" else (null, labels)
            both = pipe.transformer(torch.cat([NOISE, NOISE]), t.repeat(2), torch.cat(pair), return_dict=False)[0]
            first, second = both.chunk(2)
            return (first, second) if order == "cond_first" else (second, first)
        found = []
        for half, given in (("cond", labels), ("uncond", null)):
            state.halves = half  # type: ignore[assignment]
            found.append(pipe.transformer(NOISE, t, given).sample)
        return found[0], found[1]


def test_only_the_unconditional_half_is_lite_in_every_order() -> None:
    expected = loop_output("cond_first", diffratio.Dense())
    first = loop_output("cond_first", LITE)
    for order in ("uncond_first", "cond"):
        for one, two in zip(first, loop_output(order, LITE), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    torch.testing.assert_close(first[0], expected[0], atol=1e-5, rtol=0)
    assert (first[1] - expected[1]).abs().max() > 1e-2
    other = loop_output("cond_first", LITE, step=2)
    assert (other[1] - first[1]).abs().max() > 1e-4  # another step, another draw


@pytest.mark.parametrize("config", [diffratio.ToMe(ratio=0.5), diffratio.ToDo(factor=3)], ids=repr)
def test_both_halves_share_one_plan_in_either_order(config: Any) -> None:
    for one, two in zip(loop_output("cond_first", config), loop_output("uncond_first", config), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_the_interval_leaves_one_half_out_in_either_order() -> None:
    every = diffratio.GuidanceInterval(skip=1.0)
    first, second = loop_output("cond_first", every), loop_output("uncond_first", every)
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], second[0])
    with pytest.raises(DiffratioError, match="both halves in one batch"):
        loop_output("cond", every)


def test_draws_follow_the_seed() -> None:
    first, same, other = (images(pipeline(LITE, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.allclose(first, other, atol=1e-4)


@pytest.mark.parametrize("config", [INTERVAL, LITE], ids=repr)
def test_a_run_without_guidance_is_one_clear_error(config: Any) -> None:
    name, needs = config.method.name, "needs classifier-free guidance"
    for budget in (1.0, 0.8):
        with pytest.raises(DiffratioError, match=f"{name} {needs}"):
            diffratio.for_budget(name, dit(), budget, guidance=False)
    pipe = pipeline(config)
    for call in (diffratio.macs, diffratio.summary):
        with pytest.raises(DiffratioError, match=f"{name} {needs}"):
            call(pipe.transformer, guidance=False)  # type: ignore[operator]
    with pytest.raises(DiffratioError, match=f"{name} {needs}.*guidance_scale above 1"):
        images(pipe, scale=1.0)
    assert attachment(pipe.transformer).run is None  # the failed run is closed
    images(pipe)
    loop = SimpleNamespace(transformer=diffratio.apply_(dit(), config), scheduler=FlowMatchEulerDiscreteScheduler())
    diffratio.attach_(loop).scheduler.set_timesteps(3)
    batch = (torch.randn(3, 1, 8, 8), torch.full((3,), 900.0), torch.tensor([1, 2, 3]))
    with pytest.raises(DiffratioError, match=rf"{name} works on.*attach_\(pipe, halves='cond_first'\)"):
        loop.transformer(*batch)
    diffratio.attach_(loop, halves="cond_first").scheduler.set_timesteps(3)
    with pytest.raises(DiffratioError, match="batch of 3 does not hold two"):
        loop.transformer(*batch)
    with pytest.raises(DiffratioError, match="did you mean cond_first"):
        diffratio.attach_(loop, halves="cond_frst")  # type: ignore[arg-type]


def test_a_batch_of_two_halves_needs_the_run_that_numbers_its_step() -> None:
    loop = SimpleNamespace(transformer=diffratio.apply_(dit(), INTERVAL), scheduler=FlowMatchEulerDiscreteScheduler())
    diffratio.attach_(loop, halves="cond_first")
    with pytest.raises(DiffratioError, match="guidance_interval decides step by step"):
        loop.transformer(torch.randn(2, 1, 8, 8), torch.full((2,), 900.0), torch.tensor([1, 10]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffratio.GuidanceInterval(skip=-1),
        lambda: diffratio.GuidanceInterval(skip=1.5),
        lambda: diffratio.GuidanceInterval(skip=True),
        lambda: diffratio.GuidanceInterval(skip=float("nan")),
        lambda: diffratio.GuidanceInterval(placement="middle"),
        lambda: diffratio.GuidanceInterval(centre=2.0),
        lambda: diffratio.LiteUncond(keep=0),
        lambda: diffratio.LiteUncond(keep=float("nan")),
        lambda: diffratio.ToDo(factor=5),
        lambda: diffratio.ToDo(factor=True),
        lambda: diffratio.ToDo(factor=()),
        lambda: diffratio.ToDo(factor=(2, 0)),
        lambda: diffratio.apply_(dit(), diffratio.ToDo(factor=(2, 2))),
    ],
)
def test_configs_refuse_what_makes_no_sense(make: Any) -> None:
    with pytest.raises(DiffratioError) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "lowest"), [("guidance_interval", 0.5), ("lite_uncond", 0.5), ("todo", 0.5)])
def test_budgets_out_of_reach_name_the_range(name: str, lowest: float) -> None:
    with pytest.raises(diffratio.BudgetUnreachable) as error:
        diffratio.for_budget(name, dit(num_layers=8), 0.4)
    low, high = error.value.reachable
    assert lowest <= low < 1 == high


def test_an_interval_run_is_a_run_of_its_own() -> None:
    """Other methods are priced on it half by half."""
    run = SamplingRun((0.9, 0.6, 0.3, 0.1), TokenGrid(4, 4), guided=(False, True, True, False))
    transformer = dit()
    dense = diffratio.macs(transformer, run=run)
    assert dense.total == dense.dense and dense.fraction == 1
    assert 6 * diffratio.macs(transformer, steps=4).total == 8 * dense.total
    table = diffratio.for_budget("mod", dit(num_layers=8), 0.8, run=run)
    cost = diffratio.macs(diffratio.apply_(dit(num_layers=8), table), run=run)
    assert 0.79 <= cost.fraction <= 0.8
    fewer = diffratio.FewerSteps(0.5)
    adapted = fewer.method(fewer, None).adapt(run)  # type: ignore[arg-type]
    assert (adapted.noise_levels, adapted.guided) == ((0.9, 0.3), (False, True))
    reused = diffratio.macs(diffratio.apply_(transformer, EveryNth(2)), run=run)
    assert 6 * reused.total == 3 * dense.total
