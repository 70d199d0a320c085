"""Step schedules: bounds, files, other step counts, and what dato makes of them in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import DiffratioError
from diffratio.methods import config_from_json, config_to_json
from diffratio.methods.step_schedule import StepChoice, StepSchedule, load_step_schedule
from diffratio.sampling.pipeline import PixelDiTPipeline
from diffratio.sampling.schedulers import make_scheduler
from diffratio.surgery import describe
from diffratio.tokens.grid import TokenGrid

GRID = TokenGrid(4, 4)
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def dit() -> Any:
    torch.manual_seed(0)
    return get_backbone("dit").tiny().eval()


def schedule(actions: str, ratios: Any = None) -> StepSchedule:
    return StepSchedule.made_for(describe(dit()), uniform_run(len(actions), GRID), actions, ratios)


def letters(choices: tuple[StepChoice, ...]) -> str:
    return "".join(one.action for one in choices)


def images(sampler: str, steps: int, actions: str | None = None, ratios: Any = None) -> torch.Tensor:
    """Pictures of a guided pipeline."""
    objective = "noise" if sampler == "ddim" else "flow"
    transformer = dit()
    pipe = PixelDiTPipeline(transformer, make_scheduler(sampler, objective))
    pipe.set_progress_bar_config(disable=True)
    if actions:
        diffratio.attach_(diffratio.apply_(pipe, diffratio.DaTo(schedule=schedule(actions, ratios))))
    call = pipe([1, 2], guidance_scale=2.0, latents=NOISE, num_inference_steps=steps, output_type="pt")
    assert isinstance(call.images, torch.Tensor)
    return call.images


@pytest.mark.parametrize("sampler", ["flow_euler", "ddim"])
def test_computing_every_step_is_the_untouched_pipeline(sampler: str) -> None:
    plain = images(sampler, 4)
    assert torch.equal(images(sampler, 4, "CCCC"), plain)
    assert not torch.equal(images(sampler, 4, "CCCC", (0, 0.5, 0, 0)), plain)
    assert not torch.equal(images(sampler, 4, "CCCS"), plain)


@pytest.mark.parametrize("sampler", ["flow_euler", "ddim"])
def test_reusing_every_second_output_is_half_the_steps(sampler: str) -> None:
    torch.testing.assert_close(images(sampler, 8, "CRCRCRCR"), images(sampler, 4), atol=1e-6, rtol=0)


@torch.no_grad()
def test_reuse_drops_any_timestep_under_flow_euler() -> None:
    """A schedule of uneven steps against the untouched model on the levels that are left."""
    sigmas, actions = [1.0, 0.9, 0.7, 0.4, 0.35, 0.1], "CCRCRR"

    def sample(levels: list[float], config: Any = None) -> torch.Tensor:
        transformer, scheduler = dit(), FlowMatchEulerDiscreteScheduler()
        loop = SimpleNamespace(transformer=transformer, scheduler=scheduler)
        if config is not None:
            diffratio.attach_(diffratio.apply_(loop, config), halves="one")
        loop.scheduler.set_timesteps(sigmas=levels)
        x = NOISE.clone()
        for timestep in loop.scheduler.timesteps:
            velocity = transformer(x, timestep.expand(2), torch.tensor([1, 2]), return_dict=False)[0]
            x = loop.scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return x

    left = [sigma for sigma, action in zip(sigmas, actions, strict=True) if action == "C"]
    config = diffratio.DaTo(schedule=schedule(actions))
    torch.testing.assert_close(sample(sigmas, config), sample(left), atol=1e-6, rtol=0)
    assert not torch.allclose(sample(left), sample(sigmas), atol=1e-4)


def test_cost_counts_actions_and_ratios() -> None:
    transformer, run = dit(), uniform_run(4, GRID)
    dense = diffratio.macs(transformer, run=run)
    for actions, steps in (("CCCC", 4), ("CRCC", 3), ("CRRR", 1)):
        applied = diffratio.apply_(dit(), diffratio.DaTo(schedule=schedule(actions)))
        assert diffratio.macs(applied, run=run).total == dense.total * steps // 4
    mixed = diffratio.DaTo(schedule=schedule("CSCR", (0.5, 0, 0.75, 0)))
    assert letters(mixed.choices(4)) == "CSCR" and mixed.removed(GRID, 4) == (8, 0, 12, 0)
    cache, prune = (diffratio.DaTo(schedule=mixed.schedule, mode=mode) for mode in ("cache", "prune"))
    assert letters(cache.choices(4)) == "CSCR" and cache.removed(GRID, 4) == (0, 0, 0, 0)
    assert letters(prune.choices(4)) == "CCCC" and prune.removed(GRID, 4) == (8, 0, 12, 0)
    text = diffratio.summary(diffratio.apply_(dit(), mixed), run=run)
    assert "2 full, 1 with skipped blocks, 1 that reuse" in text


@pytest.mark.parametrize(
    ("actions", "steps", "expected"),
    [
        ("CSCR", 8, "CCSSCCRR"),
        ("CSCSCS", 3, "CSC"),
        ("CSCSCSCS", 4, "CSCS"),
        ("CCCC", 7, "CCCCCCC"),
        ("CSSSSSSR", 2, "CS"),
    ],
)
def test_other_step_counts_keep_the_share_of_computed_steps(actions: str, steps: int, expected: str) -> None:
    found = schedule(actions).over(steps)
    assert letters(found) == expected
    assert abs(letters(found).count("C") / steps - actions.count("C") / len(actions)) < 1 / steps


def test_ratios_follow_the_nearest_computed_step_and_far_counts_are_refused() -> None:
    made = schedule("CCSC", (0.1, 0.3, 0, 0.7))
    assert [one.ratio for one in made.over(8)] == [0.1, 0.1, 0.3, 0.3, 0, 0, 0.7, 0.7]
    assert made.over(4) == made.choices and len(made.over(1)) == 1 and len(made.over(16)) == 16
    with pytest.raises(DiffratioError, match="step schedule of 4 steps is carried over to 1 to 16 steps.*has 17"):
        made.over(17)
    transformer = diffratio.apply_(dit(), diffratio.DaTo(schedule=schedule("CSSSSSSS")))
    with pytest.raises(DiffratioError, match="this run has 1"):
        diffratio.macs(transformer, steps=1)


def test_files_round_trip_and_configs_read_them(tmp_path: Path) -> None:
    made, path = schedule("CSER", (0.5, 0, 0, 0)), tmp_path / "schedule.json"
    made.save(path)
    assert load_step_schedule(path) == made
    document = json.loads(path.read_text())
    assert document["format"] == "diffratio step schedule" and document["version"] == 1
    assert document["steps"][0] == {"noise_level": 1.0, "action": "C", "ratio": 0.5}
    config: Any = config_from_json({"name": "dato", "schedule": str(path), "mode": "cache"})
    assert config.schedule == made
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    broken = [
        ({"format": "other"}, "format 'other' is not"),
        ({"version": 2}, "version 2; this diffratio reads version 1"),
        ({"steps": [{"action": "C"}]}, "not a step schedule: KeyError 'noise_level'"),
        ({"steps": []}, "the action of step 0 is none and must be C"),
    ]
    for change, message in broken:
        path.write_text(json.dumps(document | change))
        with pytest.raises(DiffratioError, match=message):
            load_step_schedule(path)
    with pytest.raises(DiffratioError, match="step schedule: no file"):
        config_from_json({"name": "dato", "schedule": str(tmp_path / "none.json")})


def test_bad_schedules_are_refused() -> None:
    for action in "RSE":
        with pytest.raises(DiffratioError, match=f"the action of step 0 is '{action}' and must be C"):
            schedule(f"{action}CC")
    with pytest.raises(DiffratioError, match="unknown action 'Z'; known are C .compute"):
        schedule("CZ")
    for ratio in (0.76, -0.1, float("nan"), True):
        with pytest.raises(DiffratioError, match=r"ratio .* is outside \[0, 0.75\]"):
            schedule("CC", (0, ratio))
    with pytest.raises(DiffratioError, match="ratio 0.5 at action S; only C prunes"):
        schedule("CS", (0, 0.5))
    with pytest.raises(DiffratioError, match="2 steps and 1 noise levels"):
        StepSchedule((StepChoice(), StepChoice()), (1.0,), "dit", 3, 16)
    with pytest.raises(DiffratioError, match="noise levels must lie in"):
        StepSchedule((StepChoice(),), (1.5,), "dit", 3, 16)
    deeper = get_backbone("dit").tiny(num_layers=4)
    with pytest.raises(DiffratioError, match="dit with 3 blocks of width 16 does not fit dit with 4 blocks"):
        diffratio.apply_(deeper, diffratio.DaTo(schedule=schedule("CS")))
    assert isinstance(uniform_run(2, GRID), SamplingRun)
