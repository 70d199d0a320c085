from __future__ import annotations

from typing import Any

import pytest
import torch

from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import DiffratioError
from diffratio.sampling.schedulers import (
    SAMPLERS,
    make_scheduler,
    model_timesteps,
    noise_levels,
    set_steps,
    takes_variance,
)
from diffratio.tokens.grid import TokenGrid

PAIRS = [(name, objective) for name, sampler in SAMPLERS.items() for objective in sampler.settings]


def test_flow_euler_levels_are_the_uniform_run() -> None:
    scheduler = make_scheduler("flow_euler")
    set_steps(scheduler, 20)
    assert noise_levels(scheduler) == pytest.approx(uniform_run(20, TokenGrid(4, 4)).noise_levels, abs=1e-6)


def test_shift_moves_levels_toward_noise() -> None:
    scheduler = make_scheduler("flow_euler", shift=3.0)
    set_steps(scheduler, 20)
    assert noise_levels(scheduler) == pytest.approx([3 * u / (1 + 2 * u) for u in uniform_levels(20)], abs=1e-6)
    run = SamplingRun(noise_levels(scheduler), TokenGrid(4, 4))
    assert run.region_counts(4) == (1, 3, 5, 11)


def uniform_levels(steps: int) -> list[float]:
    return [(steps - i) / steps for i in range(steps)]


@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 33, 50, 250])
def test_levels_match_steps_and_fall(sampler: str, objective: str, steps: int) -> None:
    scheduler = make_scheduler(sampler, objective)
    set_steps(scheduler, steps)
    levels = noise_levels(scheduler)
    assert len(levels) == steps == len(scheduler.timesteps)
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
    assert levels[0] >= 0.99 and levels[-1] >= 0.0
    assert model_timesteps(scheduler).tolist() == pytest.approx([1000 * u for u in levels], abs=1e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_trailing_steps_are_complete_or_refused(sampler: str) -> None:
    scheduler = make_scheduler(sampler, "noise")
    refused = []
    for steps in range(1, 1001):
        try:
            set_steps(scheduler, steps)
        except DiffratioError:
            refused.append(steps)
            continue
        times = scheduler.timesteps
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0 and (times.diff() < 0).all()
    assert refused[:3] == ([] if sampler == "ddpm" else [61, 103, 121])


def test_every_step_of_ddpm_goes_to_the_next_one() -> None:
    scheduler = make_scheduler("ddpm", "noise")
    set_steps(scheduler, 61)
    times = scheduler.timesteps.tolist()
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps][:-1] == times[1:]
    assert scheduler.previous_timestep(scheduler.timesteps[-1]) < 0


def test_dpm_solver_regions_of_twenty_steps() -> None:
    scheduler = make_scheduler("dpm_solver", "noise")
    set_steps(scheduler, 20)
    assert SamplingRun(noise_levels(scheduler), TokenGrid(4, 4)).region_counts(4) == (4, 5, 6, 5)


def test_dpm_solver_flow_levels_are_not_cut_to_integers() -> None:
    scheduler = make_scheduler("dpm_solver", "flow", shift=2.0)
    assert scheduler.config.flow_shift == 2.0
    set_steps(scheduler, 7)
    assert noise_levels(scheduler) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert any(t != int(t) for t in model_timesteps(scheduler).tolist())


def test_who_takes_a_learned_variance() -> None:
    assert takes_variance(make_scheduler("ddpm", "noise", variance_type="learned_range"))
    assert not takes_variance(make_scheduler("ddpm", "noise"))
    assert not takes_variance(make_scheduler("ddim", "noise"))


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("dmp_solver",), {}, "did you mean dpm_solver"),
        (("ddim", "nose"), {}, "did you mean noise"),
        (("flow_euler", "flow_sample"), {}, "choose one of dpm_solver"),
        (("ddpm", "flow"), {}, "choose one of flow_euler, dpm_solver"),
        (("ddim", "flow"), {}, "choose one of flow_euler, dpm_solver"),
        (("flow_euler", "noise"), {}, "choose one of ddpm, ddim, dpm_solver"),
        (("flow_euler",), {"shfit": 3.0}, "did you mean shift"),
        (("flow_euler",), {"shift": 0.0}, "shift must be above 0"),
        (("flow_euler",), {"use_dynamic_shifting": True}, "unknown option"),
        (("dpm_solver", "noise"), {"shift": 3.0}, "unknown option"),
        (("dpm_solver", "flow"), {"prediction_type": "epsilon"}, "unknown option"),
        (("ddim", "noise"), {"beta_schedule": "cubic"}, "cubic"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises(DiffratioError, match=says) as caught:
        make_scheduler(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(DiffratioError, match="from 1 to 1000"):
        set_steps(make_scheduler("flow_euler"), steps)  # type: ignore[arg-type]


def test_dynamic_shifting_is_refused() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(DiffratioError, match="use_dynamic_shifting=False"):
        set_steps(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_timesteps_stay_on_the_host_unless_asked() -> None:
    scheduler = make_scheduler("flow_euler")
    set_steps(scheduler, 4)
    assert scheduler.timesteps.device == torch.device("cpu")
    set_steps(scheduler, 4, "meta")
    assert scheduler.timesteps.device == torch.device("meta")


@pytest.mark.parametrize("name", ["flow_euler", "dpm_solver"])
def test_a_scheduler_names_its_sampler_and_what_is_not_default(name: str) -> None:
    from diffratio.sampling.schedulers import sampler_of

    found, settings = sampler_of(make_scheduler(name, "flow", **({"shift": 3.0} if name == "flow_euler" else {})))
    assert found == name
    assert settings == ({"shift": 3.0} if name == "flow_euler" else dict(SAMPLERS[name].settings["flow"]))
