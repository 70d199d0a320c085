from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pairs import exit_codes

from diffratio.errors import DiffratioError
from diffratio.sampling.generate import (
    _mix,
    balanced_labels,
    generate,
    initial_noise,
    sample_grid,
    save_npz,
)
from diffratio.sampling.pipeline import build_pipeline
from diffratio.sampling.schedulers import make_scheduler

# Mild betas: under DiT's own, an untrained model's samples run into the clamp, where all of them agree.
SAMPLERS = [
    ("flow_euler", "flow", {}),
    ("dpm_solver", "flow", {}),
    ("dpm_solver", "noise", {"beta_end": 0.001}),
    ("ddim", "noise", {"beta_end": 0.001}),
    ("ddpm", "noise", {"beta_end": 0.001}),
]


def test_noise_depends_on_seed_and_index_alone() -> None:
    noise = initial_noise(5, [0, 1, 2, 7], (1, 8, 8))
    assert torch.equal(initial_noise(5, [7], (1, 8, 8))[0], noise[3])
    assert torch.equal(initial_noise(5, [2, 0], (1, 8, 8)), noise[[2, 0]])
    assert torch.equal(initial_noise(5, [1], (1, 8, 8), torch.bfloat16), noise[1:2].bfloat16())
    assert not torch.equal(initial_noise(6, [7], (1, 8, 8))[0], noise[3])
    assert initial_noise(5, [], (1, 8, 8)).shape == (0, 1, 8, 8)


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = initial_noise(0, range(1000), (1, 16, 16)).flatten(1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    between = (noise @ noise.T / 256).fill_diagonal_(0)
    assert between.abs().max() < 0.4  # 256 numbers: six standard deviations


def test_no_two_samples_of_a_run_share_a_generator_state() -> None:
    # torch reads the low 32 bits of a seed; 100,000 free hashes would collide about once.
    for stream in (0, 1):
        assert len({_mix(0, index, stream) & 0xFFFFFFFF for index in range(100_000)}) == 100_000
    assert _mix(0, 3, 0) != _mix(0, 3, 1) != _mix(1, 3, 1)


def test_the_seeds_stay_what_they_were() -> None:
    # Published figures rest on these: a change of the mix changes every sample.
    assert [_mix(0, 0, 0), _mix(0, 1, 0), _mix(3, 0, 1)] == [3113667921, 2352270846, 306207900]


def test_balanced_labels() -> None:
    assert balanced_labels(5, 3) == [0, 1, 2, 0, 1]
    with pytest.raises(DiffratioError, match="at least 1"):
        balanced_labels(5, 0)


@pytest.mark.parametrize(("sampler", "objective", "options"), SAMPLERS)
def test_a_sample_is_the_same_alone_and_in_a_batch(
    sampler: str, objective: str, options: dict[str, Any], dit: Any
) -> None:
    pipe = build_pipeline(dit, make_scheduler(sampler, objective, **options))
    together = generate(pipe, 7, seed=3, steps=6, quiet=True)
    assert together.shape == (7, 1, 8, 8) and together.dtype == torch.float32
    assert together.min() >= -1 and together.max() <= 1
    assert (together.abs() < 1).float().mean() > 0.3
    in_batches = generate(pipe, 7, seed=3, steps=6, batch_size=3, quiet=True)
    alone = generate(pipe, 1, seed=3, steps=6, start=4, quiet=True)
    torch.testing.assert_close(in_batches, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[0], together[4], atol=1e-5, rtol=0)
    assert (generate(pipe, 7, seed=4, steps=6, quiet=True) - together).abs().max() > 0.1


def test_ddpm_draws_noise_at_its_steps(dit: Any) -> None:
    pipe = build_pipeline(dit, make_scheduler("ddpm", "noise", beta_end=0.001))
    noise = initial_noise(0, [0], (1, 8, 8))
    first, second = (
        pipe([0], 2.0, 6, torch.Generator().manual_seed(i), noise, output_type="pt").images for i in range(2)
    )
    assert (first - second).abs().max() > 0.05


def test_labels_reach_the_model(dit: Any) -> None:
    pipe = build_pipeline(dit, make_scheduler("flow_euler"), id2label={i: f"c{i}" for i in range(10)})
    balanced = generate(pipe, 4, start=8, steps=3, quiet=True)
    torch.testing.assert_close(generate(pipe, 4, start=8, steps=3, labels=[8, "c9", 0, "c1"], quiet=True), balanced)
    other = generate(pipe, 4, start=8, steps=3, labels=[8, 9, 0, 5], quiet=True)
    torch.testing.assert_close(other[:3], balanced[:3])
    assert (other[3] - balanced[3]).abs().max() > 1e-4


def test_the_bar_of_the_pipeline_is_left_as_it_was(dit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = build_pipeline(dit, make_scheduler("flow_euler"))
    pipe.set_progress_bar_config(desc="mine")
    generate(pipe, 2, steps=1, quiet=True)
    assert capsys.readouterr().err == ""
    generate(pipe, 2, steps=1)
    assert "sampling" in capsys.readouterr().err
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_latent_models_sample_independently_of_their_batch(tiny_dit: Any) -> None:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1
    )
    latent = tiny_dit(4, classes=1000, channels=4)
    pipe = build_pipeline(latent, make_scheduler("ddim", "noise"), vae.eval(), {3: "shark"})
    together = generate(pipe, 3, steps=3, labels=[1, 2, "shark"], quiet=True)
    assert together.shape == (3, 3, 8, 8)
    alone = generate(pipe, 1, start=2, steps=3, labels=[3], quiet=True)
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=0)
    for wrong, says in (([1001], "class 1001 is out of range: give 0 to 999"), (["cod"], "unknown class 'cod'")):
        with pytest.raises(DiffratioError, match=says):
            generate(pipe, 1, steps=1, labels=wrong, quiet=True)
    stochastic = make_scheduler("dpm_solver", "noise", algorithm_type="sde-dpmsolver++")
    for scheduler in (make_scheduler("ddpm", "noise"), stochastic):
        with pytest.raises(DiffratioError, match="choose sampler ddim or dpm_solver"):
            generate(build_pipeline(latent, scheduler, vae), 1, steps=1, quiet=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 2, "batch_size": 0}, "batch_size must be at least 1"),
        ({"n": 2, "start": -1}, "start must be at least 0"),
        ({"n": 2, "labels": [1]}, "1 labels for n=2"),
    ],
)
def test_bad_input(options: dict[str, Any], says: str, dit: Any) -> None:
    with pytest.raises(DiffratioError, match=says):
        generate(build_pipeline(dit, make_scheduler("flow_euler")), steps=1, **options)


PROCESS = """
import sys, torch
torch.set_num_threads(1)
from diffratio.sampling.generate import generate
from diffratio.sampling.pipeline import PixelDiTPipeline
pipe = PixelDiTPipeline.from_pretrained(f"{sys.argv[1]}/pipe")
out = {n: generate(pipe, n, seed=1, steps=3, quiet=True) for n in (5, 1)}
from accelerate import PartialState
state = PartialState()
assert state.num_processes == 2
alone = generate(pipe, 1 + state.process_index, seed=1, steps=3, quiet=True, distributed=False)
torch.save((out, alone), f"{sys.argv[1]}/{state.process_index}.pt")
state.destroy_process_group()
"""


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_shares_are_equal_and_in_index_order(n: int, dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_pipeline(dit, make_scheduler("flow_euler"))
    expected = generate(pipe, n, start=2, steps=2, quiet=True)
    shares: list[torch.Tensor] = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        shares.append(mine)
        return torch.cat([*shares, *[mine] * (3 - len(shares))])

    monkeypatch.setattr("accelerate.utils.gather", gather)
    for rank in range(3):
        state = SimpleNamespace(num_processes=3, process_index=rank, is_main_process=rank == 0, device="cpu")
        monkeypatch.setattr("diffratio.sampling.generate._processes", lambda state=state: state)
        gathered = generate(pipe, n, start=2, steps=2, quiet=True)
    assert {len(share) for share in shares} == {-(-n // 3)}
    torch.testing.assert_close(gathered, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_give_every_one_the_whole_result(dit: Any, tmp_path: Path) -> None:
    pipe = build_pipeline(dit, make_scheduler("ddpm", "noise", beta_end=0.001))
    pipe.save_pretrained(tmp_path / "pipe")
    assert exit_codes(PROCESS, str(tmp_path)) == [0, 0]
    expected = generate(pipe, 5, seed=1, steps=3, quiet=True)
    for rank in range(2):
        out, alone = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(out[5], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(out[1], expected[:1], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone, expected[: 1 + rank], atol=1e-5, rtol=0)


def test_sample_grid_places_rows_and_columns() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 4, 4)
    grid = sample_grid(images, columns=3, scale=2)
    assert grid.mode == "L" and grid.size == (2 * (3 * 5 - 1), 2 * (2 * 5 - 1))
    assert [grid.getpixel((2 * 5 * column, 0)) for column in range(3)] == [0, 64, 128]
    assert [grid.getpixel((2 * 5 * column + 7, 2 * 5 + 7)) for column in range(3)] == [191, 255, 255]
    assert grid.getpixel((8, 0)) == 255  # the line between
    assert sample_grid(torch.zeros(2, 3, 4, 4), columns=9, scale=1).size == (9, 4)
    with pytest.raises(DiffratioError, match="columns and scale"):
        sample_grid(images, columns=0)
    with pytest.raises(DiffratioError, match="expected"):
        sample_grid(torch.zeros(2, 4, 4), columns=1)


def test_save_npz_is_uint8_nhwc_and_leaves_nothing_else(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 2, 2).expand(3, 3, 2, 2)
    save_npz(tmp_path / "samples.npz", images)
    with np.load(tmp_path / "samples.npz") as archive:
        array = archive["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (3, 2, 2, 3)
    assert array[0, :, :, 0].tolist() == [[0, 128], [255, 255]]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    save_npz(tmp_path / "samples.npz", images, [2, 0, 1])
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [2, 0, 1] and archive["arr_1"].dtype == np.int64
    with pytest.raises(DiffratioError, match="2 labels for 3 pictures"):
        save_npz(tmp_path / "samples.npz", images, [2, 0])


def test_progress_is_told_after_every_batch(dit: Any) -> None:
    told: list[int] = []
    pipe = build_pipeline(dit, make_scheduler("flow_euler"))
    generate(pipe, 5, batch_size=2, steps=1, quiet=True, progress=told.append)
    assert told == [2, 2, 1]


def test_an_error_in_another_process_is_raised_here(dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True, device="cpu")
    monkeypatch.setattr("diffratio.sampling.generate._processes", lambda: state)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, "process 1: RuntimeError: no memory"])
    with pytest.raises(DiffratioError, match="process 1: RuntimeError: no memory"):
        generate(build_pipeline(dit, make_scheduler("flow_euler")), 2, steps=1, quiet=True)
