"""Token masks: what is drawn is what the plans said, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffratio
from diffratio import surgery
from diffratio.backbones import get_backbone
from diffratio.evaluation.masks import COLUMNS, mask_overlays, trace_tokens
from diffratio.evaluation.pictures import COMPUTED, draw_masks, first_row, png_bytes, slug
from diffratio.routing.schedule import KeepSchedule
from diffratio.sampling.generate import generate, sample_grid
from diffratio.sampling.pipeline import PixelDiTPipeline
from diffratio.sampling.schedulers import make_scheduler

STEPS = 4
BINS = ((3, 7), (10, 5), (0, 10))  # [layer][region]; of 16 tokens 3 tenths are 5, 5 tenths 8, 7 tenths 12


def pipeline(sampler: str = "flow_euler", objective: str = "flow") -> Any:
    torch.manual_seed(0)
    transformer = get_backbone("dit").tiny().eval()
    return PixelDiTPipeline(transformer, make_scheduler(sampler, objective), {"0": "shirt, top", "1": "shoe"})


def attached(config: Any, pipe: Any | None = None) -> Any:
    pipe = pipe or pipeline()
    surgery.apply_(pipe.transformer, config)
    return surgery.attach_(pipe)


def routed() -> Any:
    pipe = pipeline()
    run = get_backbone("dit").default_run(pipe.transformer, STEPS, "cfg")
    return attached(diffratio.MoD(schedule=KeepSchedule(BINS, run)), pipe)


def state_of(pipe: Any) -> list[Any]:
    """Everything that a trace could leave behind."""
    method = surgery.attachment(pipe.transformer).token_method
    return [sorted(vars(pipe.scheduler)), sorted(vars(method)), sorted(vars(surgery.attachment(pipe.transformer)))]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_counts_equal_the_keep_plans(guidance: float) -> None:
    pipe = routed()
    trace = trace_tokens(pipe, [0, 1], STEPS, guidance)
    assert trace.computed.shape == (STEPS, 2, 16) and trace.predictions.shape == (STEPS, 2, 1, 8, 8)
    levels = (1.0, 0.75, 0.5, 0.25)
    for step, level in enumerate(levels):
        region = int(level >= 0.5)
        counts = [(row[region] * 16 + 9) // 10 for row in BINS]
        for sample in range(2):
            assert trace.computed[step, sample].sum().item() * len(BINS) == pytest.approx(sum(counts), abs=1e-4)


def test_the_very_tokens_are_those_of_the_plan() -> None:
    pipe = routed()
    method = surgery.attachment(pipe.transformer).token_method
    method.kept_index = []
    seen: list[list[Any]] = []
    step = pipe.scheduler.step

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(list(method.kept_index))
        return step(*args, **kwargs)

    pipe.scheduler.step = recording
    generate(pipe, 2, labels=[0, 1], batch_size=2, steps=STEPS, guidance_scale=1.0, quiet=True)
    del pipe.scheduler.step
    trace = trace_tokens(pipe, [0, 1], STEPS, 1.0)
    for at, kept in enumerate(seen):
        expected = torch.zeros(2, 16)
        region = int((1.0, 0.75, 0.5, 0.25)[at] >= 0.5)
        for layer, index in enumerate(kept):
            if index is not None:
                expected.scatter_add_(1, index, torch.ones(index.shape))
            elif BINS[layer][region] == 10:
                expected += 1
        assert torch.allclose(trace.computed[at], expected / len(BINS))


def test_merged_tokens_count_by_the_sites_that_merge_them() -> None:
    pipe = attached(diffratio.ToMe(ratio=0.5))
    trace = trace_tokens(pipe, [0, 1], STEPS)
    sites = len(surgery.attachment(pipe.transformer).token_method.description.blocks[0].sites)
    # 8 of 16 tokens keep their own place in self-attention, all of them in the block's other sites
    assert torch.allclose(trace.computed.mean(dim=2), torch.full((STEPS, 2), 1 - 0.5 / sites), atol=1e-6)
    merged = attached(diffratio.ToMe(ratio=0.5, layers=(1,)))
    assert trace_tokens(merged, [0], STEPS).computed.mean().item() == pytest.approx(1 - 0.5 / sites / 3)


def test_dense_computes_everything() -> None:
    for pipe in (pipeline(), attached(diffratio.Dense()), attached(diffratio.ToMe(ratio=0.0))):
        computed = trace_tokens(pipe, [0, 1, 1], STEPS).computed
        assert torch.allclose(computed, torch.ones(STEPS, 3, 16))


@pytest.mark.parametrize("sampler", ["flow_euler", "ddim", "dpm_solver"])
def test_the_last_prediction_is_the_picture(sampler: str) -> None:
    pipe = pipeline(sampler, "flow" if sampler == "flow_euler" else "noise")
    trace = trace_tokens(pipe, [0, 1], STEPS, 1.0)
    images = generate(pipe, 2, labels=[0, 1], batch_size=2, steps=STEPS, guidance_scale=1.0, quiet=True)
    assert torch.allclose(trace.predictions[-1].clamp(-1, 1), images, atol=1e-4)
    assert not torch.allclose(trace.predictions[0].clamp(-1, 1), images, atol=1e-2)


def test_nothing_stays_behind(tmp_path: Path) -> None:
    for pipe in (routed(), attached(diffratio.ToMe(ratio=0.5))):
        first = generate(pipe, 3, labels=[0, 1, 2], steps=STEPS, quiet=True)
        before, random = state_of(pipe), torch.get_rng_state()
        mask_overlays(pipe, tmp_path, "a", labels=(0, 1), steps=STEPS)
        assert state_of(pipe) == before and torch.equal(torch.get_rng_state(), random)
        assert surgery.attachment(pipe.transformer).run is None
        assert torch.equal(generate(pipe, 3, labels=[0, 1, 2], steps=STEPS, quiet=True), first)


def test_an_error_leaves_nothing_behind_either() -> None:
    pipe = routed()
    before = state_of(pipe)
    with pytest.raises(diffratio.DiffratioError):
        trace_tokens(pipe, [99], STEPS)
    assert state_of(pipe) == before


def test_the_strip_is_written_under_a_name_that_a_record_may_hold(tmp_path: Path) -> None:
    (path,) = mask_overlays(routed(), tmp_path, "tome@finetuned-80-s0", steps=STEPS, labels=(0, 13))
    assert path == "images/masks-tome-finetuned-80-s0.png"
    with Image.open(tmp_path / path) as image:
        assert image.mode == "RGBA" and image.width > STEPS * 100
    assert [file.name for file in (tmp_path / "images").iterdir()] == [Path(path).name]


def test_more_computed_is_brighter() -> None:
    pictures = torch.full((1, 1, 1, 4, 4), -1.0)
    shares = torch.tensor([[0.0, 0.5], [0.75, 1.0]])[None, None]
    strip = draw_masks(pictures, shares, ["step 1 of 1"], ["shirt"]).convert("RGB")
    scale, top = 28, 54  # 112 pixels of 4; the picture stands above
    places = [(112 + 28 + 56 * (i % 2), top + 112 + 6 + 28 + 56 * (i // 2)) for i in range(4)]
    light = [sum(strip.getpixel(place)) for place in places]  # type: ignore[arg-type]
    assert light == sorted(light) and light[0] == 0 and light[-1] > 0.8 * sum(COMPUTED) and scale * 4 == 112


def test_strips_come_back_as_they_were_generated() -> None:
    images = torch.linspace(-1, 1, 20 * 64).reshape(20, 1, 8, 8)
    row = first_row(png_bytes(sample_grid(images, columns=10)))
    expected = sample_grid(images[:10], columns=10, scale=1)
    assert row is not None and row.size == expected.size
    assert row.convert("L").tobytes() == expected.tobytes()
    assert first_row(png_bytes(Image.new("L", (256, 128)))) is None


def test_names_are_safe() -> None:
    assert slug("tome@finetuned 0.8") == "tome-finetuned-0.8" and slug("../x") == "x" and slug("/") == "x"
    assert COLUMNS == 5
