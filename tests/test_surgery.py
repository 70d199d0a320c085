"""Methods go into transformers and pipelines and come out again."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.methods.tome import ToMeMethod
from diffratio.surgery import attachment, is_applied

BINS = ((10, 3, 7, 5), (4, 10, 2, 9), (6, 1, 10, 8))
STEPS = 6


def dit(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return get_backbone("dit").tiny(**changes).eval()


def routed(seed: int = 0) -> Any:
    transformer = dit(seed)
    run = get_backbone("dit").default_run(transformer, STEPS)
    return diffratio.apply_(transformer, diffratio.DiffCR(diffratio.KeepSchedule(BINS, run, 0.9)))


def pipeline(transformer: Any, scheduler: Any = None) -> Any:
    return SimpleNamespace(transformer=transformer, scheduler=scheduler or FlowMatchEulerDiscreteScheduler())


@torch.no_grad()
def generate(pipe: Any, steps: int = STEPS, seed: int = 5, visit: Any = None) -> Tensor:
    """The loop of diffusers' DiTPipeline: both guidance halves in one batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    labels = torch.tensor([1, 2, 10, 10])
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        doubled = torch.cat([x, x])
        output = pipe.transformer(doubled, t.expand(4), labels, return_dict=False)[0]
        conditional, unconditional = output.chunk(2)
        if visit:
            visit(pipe.transformer, t)
        x = pipe.scheduler.step(unconditional + 2 * (conditional - unconditional), t, x, return_dict=False)[0]
    return x


SCHEDULERS = pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])


@SCHEDULERS
def test_regions_follow_the_scheduler(scheduler: Any) -> None:
    pipe = diffratio.attach_(pipeline(routed(), scheduler()))
    seen: list[tuple[int | None, int]] = []

    def visit(transformer: Any, t: Tensor) -> None:
        state = attachment(transformer)
        regions = state.token_method.regions  # type: ignore[attr-defined]
        assert regions.tensor is None  # nothing was read from the device
        assert state.context is not None and state.context.noise_levels is None
        assert state.context.step == len(seen)
        assert state.context.noise_level == pytest.approx(float(t) / 1000, abs=1e-6)
        seen.append((regions.shared, min(3, int(4 * float(t) / 1000 + 1e-6))))

    generate(pipe, visit=visit)
    assert len(seen) == STEPS
    assert all(region == expected for region, expected in seen)
    assert len({region for region, _ in seen}) == 4


@SCHEDULERS
def test_a_second_generation_equals_the_first(scheduler: Any) -> None:
    for transformer in (routed(), diffratio.apply_(dit(), diffratio.ToMe(ratio=0.5))):
        pipe = diffratio.attach_(pipeline(transformer, scheduler()))
        first = generate(pipe)
        generate(pipe, steps=3, seed=9)  # another run between them
        assert torch.equal(generate(pipe), first)
        assert not torch.equal(generate(pipe, seed=6), first)


def test_draws_change_from_step_to_step_and_with_the_seed() -> None:
    pipe = diffratio.attach_(pipeline(diffratio.apply_(dit(), diffratio.ToMe(ratio=0.5), seed=3)))
    destinations: list[list[int]] = []

    def visit(transformer: Any, _: Tensor) -> None:
        destinations.append(attachment(transformer).token_method.split[1].tolist())  # type: ignore[attr-defined]

    generate(pipe, visit=visit)
    assert len({tuple(row) for row in destinations}) > 1
    first, destinations = destinations, []
    other = diffratio.attach_(pipeline(diffratio.apply_(dit(), diffratio.ToMe(ratio=0.5), seed=4)))
    generate(other, visit=visit)
    assert destinations != first


@SCHEDULERS
def test_attached_generation_equals_one_from_timesteps_alone(scheduler: Any) -> None:
    """The run is a convenience: regions read from each forward's timestep are the same."""
    attached = generate(diffratio.attach_(pipeline(routed(), scheduler())))
    assert torch.equal(generate(pipeline(routed(), scheduler())), attached)
    assert not torch.equal(generate(pipeline(dit(), scheduler())), attached)


def test_a_dense_schedule_generates_what_the_dense_model_does() -> None:
    run = uniform_run(STEPS, get_backbone("dit").grid(dit()))
    transformer = diffratio.apply_(dit(), diffratio.DiffCR(diffratio.KeepSchedule(((10,),) * 3, run)))
    assert torch.equal(generate(diffratio.attach_(pipeline(transformer))), generate(pipeline(dit())))


def test_a_forward_too_many_is_an_error() -> None:
    transformer = routed()
    state = attachment(transformer)
    state.open_run(uniform_run(2, get_backbone("dit").grid(transformer)))
    batch = (torch.randn(1, 1, 8, 8), torch.tensor([500.0]), torch.tensor([1]))
    for _ in range(2):
        transformer(*batch)
        state.step += 1
    with pytest.raises(DiffratioError, match=r"run has 2 steps.*set_timesteps.*detach_"):
        transformer(*batch)
    state.close_run()
    transformer(*batch)


def test_a_finished_run_closes_itself() -> None:
    pipe = diffratio.attach_(pipeline(routed()))
    generate(pipe)
    state = attachment(pipe.transformer)
    assert (state.run, state.step, state.context) == (None, 0, None)
    level = torch.tensor([300.0, 800.0])
    pipe.transformer(torch.randn(2, 1, 8, 8), level, torch.tensor([1, 2]))
    assert state.token_method.regions.each == (1, 3)  # type: ignore[attr-defined]


def test_the_first_forward_of_a_run_says_its_grid_and_another_one_is_an_error() -> None:
    pipe = diffratio.attach_(pipeline(routed()))
    pipe.scheduler.set_timesteps(4)
    rest = torch.tensor([1000.0]), torch.tensor([1])
    pipe.transformer(torch.randn(1, 1, 12, 12), *rest)
    run = attachment(pipe.transformer).run
    assert run is not None and (run.grid.height, run.grid.width) == (6, 6)
    with pytest.raises(DiffratioError, match="6x6.*4x4"):
        pipe.transformer(torch.randn(1, 1, 8, 8), *rest)


def test_stateful_methods_need_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToMeMethod, "stateful", True)
    pipe = pipeline(diffratio.apply_(dit(), diffratio.ToMe(ratio=0.5)))
    with pytest.raises(DiffratioError, match=r"tome keeps state.*attach_\(pipe\)"):
        generate(pipe)
    generate(diffratio.attach_(pipe))
    with pytest.raises(DiffratioError, match="needs an open run"):  # the run of the generation is over
        pipe.transformer(torch.randn(1, 1, 8, 8), torch.tensor([1000.0]), torch.tensor([1]))


def test_samples_at_their_own_noise_levels_outside_a_run() -> None:
    transformer = routed()
    x, levels, labels = torch.randn(4, 1, 8, 8), torch.tensor([50.0, 300.0, 600.0, 999.0]), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        together = transformer(x, levels, labels, return_dict=False)[0]
        assert attachment(transformer).token_method.regions.each == (0, 1, 2, 3)  # type: ignore[attr-defined]
        for i in range(4):
            alone = transformer(x[i : i + 1], levels[i : i + 1], labels[i : i + 1], return_dict=False)[0]
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@SCHEDULERS
def test_detach_and_remove_restore_the_scheduler(scheduler: Any) -> None:
    pipe = pipeline(routed(), scheduler())
    attributes = set(vars(pipe.scheduler))
    diffratio.attach_(diffratio.attach_(pipe))  # twice is once
    assert isinstance(pipe.scheduler, scheduler)
    assert type(pipe.scheduler) is not scheduler
    assert type(pipe.scheduler).__name__ == scheduler.__name__  # what diffusers writes into model_index.json
    pipe.scheduler.set_timesteps(3)
    diffratio.detach_(pipe)
    assert type(pipe.scheduler) is scheduler
    assert attachment(pipe.transformer).run is None
    assert not any("diffratio" in name for name in vars(pipe.scheduler))
    assert attributes <= set(vars(pipe.scheduler))
    diffratio.attach_(pipe)
    diffratio.remove_(pipe)
    assert type(pipe.scheduler) is scheduler
    assert not is_applied(pipe.transformer)
    assert torch.equal(generate(pipe), generate(pipeline(dit(), scheduler())))


def test_apply_and_attach_take_pipelines() -> None:
    pipe = pipeline(dit())
    assert diffratio.apply_(pipe, diffratio.ToMe(ratio=0.5)) is pipe
    assert is_applied(pipe.transformer)
    with pytest.raises(DiffratioError, match="nothing is applied"):
        diffratio.attach_(pipeline(dit()))
    with pytest.raises(DiffratioError, match="holds no transformer"):
        diffratio.attach_(SimpleNamespace(unet=dit(), scheduler=None))


def test_attached_schedulers_pickle_and_copy_with_their_own_transformer() -> None:
    pipe = diffratio.attach_(pipeline(routed()))
    expected = generate(pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert twin.scheduler._diffratio is attachment(twin.transformer)
        assert twin.scheduler._diffratio is not attachment(pipe.transformer)
        assert torch.equal(generate(twin), expected)


def test_two_pipelines_in_one_process_do_not_disturb_each_other() -> None:
    """Interleaved step by step, with different numbers of steps."""
    first, second = diffratio.attach_(pipeline(routed(0))), diffratio.attach_(pipeline(routed(1)))
    dense = pipeline(dit(0))
    expected = [generate(first), generate(second, steps=4), generate(dense)]
    other: list[Tensor] = []

    def interleave(*_: Any) -> None:
        other.append(generate(second, steps=4))
        other.append(generate(dense))

    assert torch.equal(generate(first, visit=interleave), expected[0])
    assert all(torch.equal(result, expected[1 + i % 2]) for i, result in enumerate(other))
    diffratio.remove_(second)
    assert torch.equal(generate(first), expected[0])


def test_a_real_pipeline_follows_its_scheduler(tmp_path: Any) -> None:
    from diffratio.sampling.pipeline import PixelDiTPipeline
    from diffratio.sampling.schedulers import make_scheduler

    def images(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return pipe([1, 2], latents=latents, num_inference_steps=4, output_type="pt").images

    pipe = PixelDiTPipeline(routed(), make_scheduler("flow_euler"))
    expected = images(pipe)
    assert torch.equal(images(diffratio.attach_(pipe)), expected)
    with pytest.raises(DiffratioError, match="export"):
        pipe.save_pretrained(tmp_path / "routed")
    diffratio.remove_(pipe)
    pipe.save_pretrained(tmp_path / "dense")
    assert torch.equal(images(PixelDiTPipeline.from_pretrained(tmp_path / "dense")), images(pipe))
    assert not torch.equal(images(pipe), expected)


def test_save_pretrained_of_a_learned_method_is_refused(tmp_path: Any) -> None:
    for config in (diffratio.DiffCR(), diffratio.MoD(keep=0.5), diffratio.Hand(keep=0.5)):
        transformer = diffratio.apply_(dit(), config)
        with pytest.raises(DiffratioError, match="silently dense.*export"):
            transformer.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_matched_names_the_module_classes() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.LayerNorm(3)

    for verb in (lambda m: diffratio.apply_(m, diffratio.ToMe(ratio=0.5)), backbone_of, diffratio.macs):
        with pytest.raises(DiffratioError, match=r"Strange \(holding Conv2d, LayerNorm\).*DiTTransformer2DModel"):
            verb(Strange())
    with pytest.raises(DiffratioError, match="no submodules"):
        diffratio.apply_(nn.ReLU(), diffratio.ToMe(ratio=0.5))
    with pytest.raises(DiffratioError, match="no site 'cross_attention'; it has self_attention, feed_forward"):
        diffratio.apply_(dit(), diffratio.ToMe(ratio=0.5, sites=("cross_attention",)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffratio.ToMe(ratio=0.8),
        lambda: diffratio.ToMe(ratio=float("nan")),
        lambda: diffratio.ToMe(ratio=0.5, sites=()),
        lambda: diffratio.ToMe(ratio=0.5, sites=("self_attention", "self_attention")),
        lambda: diffratio.ToMe(ratio=0.5, sites=("attention",)),
        lambda: diffratio.ToMe(ratio=0.5, metric="keys"),
        lambda: diffratio.MoD(keep=0),
        lambda: diffratio.MoD(keep=float("nan")),
        lambda: diffratio.Hand(blocks=1.5),
        lambda: diffratio.FewerSteps(0),
        lambda: diffratio.DiffCR(regions=0),
        lambda: diffratio.DiffCR(regions=True),
        lambda: diffratio.DiffCR(estimator="sum"),
    ],
)
def test_configs_refuse_what_makes_no_sense(make: Any) -> None:
    with pytest.raises(DiffratioError) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_refused_apply_leaves_the_transformer_as_it_was() -> None:
    transformer = dit()
    run = uniform_run(4, get_backbone("dit").grid(transformer))
    refused: tuple[Any, ...] = (
        diffratio.DiffCR(diffratio.KeepSchedule(((5,),) * 9, run)),
        diffratio.ToMe(ratio=0.5, layers=(7,)),
        diffratio.ToMe(ratio=0.5, sites=("cross_attention",)),
        [diffratio.ToMe(ratio=0.5), diffratio.MoD(keep=0.5)],
        [],
        "tome",
    )
    for config in refused:
        with pytest.raises(DiffratioError):
            diffratio.apply_(transformer, config)
        assert not is_applied(transformer)
        assert [type(module) for module in transformer.modules()] == [type(module) for module in dit().modules()]
        assert transformer.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob > 0
    with pytest.raises(DiffratioError, match="nothing is applied"):
        diffratio.remove_(transformer)


def test_bypassed_blocks_are_not_run() -> None:
    transformer = dit()
    run = uniform_run(4, get_backbone("dit").grid(transformer))
    diffratio.apply_(transformer, diffratio.DiffCR(diffratio.KeepSchedule(((10,), (0,), (10,)), run)))
    shorter = dit()
    del shorter.transformer_blocks[1]
    batch = (torch.randn(2, 1, 8, 8), torch.tensor([50.0, 900.0]), torch.tensor([1, 2]))
    with torch.no_grad():
        assert torch.equal(transformer(*batch).sample, shorter(*batch).sample)


def test_dropped_tokens_pass_a_block_bit_for_bit() -> None:
    transformer = routed()
    method: Any = attachment(transformer).token_method
    method.kept_index, passed = [], []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda _, args, y: passed.append((args[0], y)))
    with torch.no_grad():
        transformer(torch.randn(2, 1, 8, 8), torch.tensor([600.0, 600.0]), torch.tensor([1, 2]))  # region 2: 7 2 10
    assert [None if index is None else index.shape[1] for index in method.kept_index] == [12, 4, None]
    for index, (x, y) in zip(method.kept_index[:2], passed[:2], strict=True):
        same = (x == y).all(-1)
        for b in range(2):
            kept = index[b].tolist()
            assert [n for n in range(16) if not same[b, n]] == kept


def test_compile_options_need_not_be_hashable() -> None:
    transformer = diffratio.apply_(dit(), diffratio.Dense())
    diffratio.compile_(transformer, backend="eager", options={"debug": {}})
    assert attachment(transformer).compile_options == {"dynamic": True, "backend": "eager", "options": {"debug": {}}}
    with pytest.raises(DiffratioError, match="nothing is applied"):
        diffratio.compile_(dit())


@SCHEDULERS
def test_a_scheduler_made_from_an_attached_one_stands_alone(scheduler: Any) -> None:
    pipe = diffratio.attach_(pipeline(routed(), scheduler()))
    made = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made.set_timesteps(3)
    plain = scheduler()
    plain.set_timesteps(3)
    assert torch.equal(made.timesteps, plain.timesteps)
    assert attachment(pipe.transformer).run is None
