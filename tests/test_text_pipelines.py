"""Text-conditional pipelines from end to end: attached, saved, exported and loaded again."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from text_pipelines import PIPELINES, TEXT_TOKENS, pictures, tiny_pipeline

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.surgery import attachment, is_applied
from diffratio.tokens.grid import TokenGrid

GRID = TokenGrid(4, 4)
KINDS = tuple(PIPELINES)
SAMPLED = [
    *((kind, name) for kind in ("alpha", "sigma") for name in ("dense", "mod", "tome", "sdtm", "importance")),
    *((kind, "guidance_interval") for kind in ("alpha", "sigma", "sd3")),
    *((kind, name) for kind in ("sd3", "flux") for name in ("mod", "tome")),
    ("flux", "sdtm"),
    ("sd3", "dato"),
    ("sd3", "sdtm_cached"),
]


def run_of(pipe: Any, grid: TokenGrid = GRID, steps: int = 5) -> SamplingRun:
    """What the pipeline of these tests samples."""
    kind = next(kind for kind, cls in PIPELINES.items() if isinstance(pipe, cls))
    if kind == "flux":  # no guidance halves, and levels that follow the number of tokens
        run = get_backbone(kind).default_run(pipe.transformer, steps)
        return replace(run, grid=grid, text_tokens=TEXT_TOKENS[kind])
    pipe.scheduler.set_timesteps(steps)
    levels = tuple((pipe.scheduler.timesteps.float() / 1000).tolist())
    return SamplingRun(levels, grid, "cfg", TEXT_TOKENS[kind])


def routed(kind: str = "alpha", **changes: Any) -> Any:
    """A pipeline routed at 0.8 of the dense MACs, with routers that have an opinion."""
    pipe = tiny_pipeline(kind, **changes)
    diffratio.apply_(pipe, diffratio.for_budget("mod", pipe.transformer, 0.8, run=run_of(pipe)))
    for block in backbone_of(pipe.transformer).blocks(pipe.transformer):
        torch.nn.init.normal_(block.router.weight)
    return diffratio.attach_(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_pipeline_folder_loads_as_it_was(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffratio.load_pipeline(tmp_path / "pipe")
    assert type(loaded) is PIPELINES[kind]
    assert torch.equal(pictures(loaded), pictures(pipe))
    assert not torch.equal(pictures(pipe, ("a dog", "a cow")), pictures(pipe))  # the prompt matters


@pytest.mark.parametrize(("kind", "method"), SAMPLED)
def test_a_method_costs_what_is_counted_while_sampling(kind: str, method: str) -> None:
    pipe = tiny_pipeline(kind)
    dense, run = pictures(pipe), run_of(pipe)
    config = diffratio.Dense() if method == "dense" else diffratio.for_budget(method, pipe.transformer, 0.8, run=run)
    diffratio.attach_(diffratio.apply_(pipe, config))
    counted = count_macs(pipe.transformer, lambda: pictures(pipe))  # by another attention kernel
    cost = diffratio.macs(pipe.transformer, run=run)
    # a batch of two prompts; ranking is a matrix-vector product, which the counter leaves out
    uncounted = cost.planning if attachment(pipe.transformer).token_method.learned else 0
    assert counted == pytest.approx(2 * (cost.total - uncounted), rel=1e-3)
    images = pictures(pipe)
    assert images.shape == dense.shape and images.isfinite().all()
    assert torch.equal(images, dense) == (method == "dense")
    assert torch.equal(pictures(pipe), images)  # a run leaves nothing behind
    diffratio.remove_(pipe)
    assert torch.equal(pictures(pipe), dense)


def test_pictures_of_another_size_are_sampled_on_their_own_grid() -> None:
    """The scheduler opens the run before any sample is seen."""
    pipe = tiny_pipeline("alpha")
    size = {"height": 24, "width": 16}  # latents 12x8
    dense = pictures(pipe, **size)
    diffratio.attach_(diffratio.apply_(pipe, diffratio.Dense()))
    assert torch.equal(pictures(pipe, **size), dense)
    assert pictures(pipe).shape[-2:] == (16, 16)
    diffratio.remove_(pipe)
    run = run_of(pipe, TokenGrid(6, 4))
    config = diffratio.for_budget("tome", pipe.transformer, 0.8, run=run)
    diffratio.attach_(diffratio.apply_(pipe, config))
    counted = count_macs(pipe.transformer, lambda: pictures(pipe, **size))
    assert counted == pytest.approx(2 * diffratio.macs(pipe.transformer, run=run).total, rel=1e-3)


def test_flux_opens_its_run_on_the_levels_and_the_grid_that_are_sampled() -> None:
    """Its scheduler is given sigmas and a shift by the pipeline, and the grid stands in img_ids."""
    pipe = tiny_pipeline("flux")
    size = {"height": 24, "width": 16, "num_inference_steps": 4}
    dense = pictures(pipe, **size)
    read = ("set_timesteps", "step")  # pipelines look there for sigmas, eta and a generator
    signatures = [inspect.signature(getattr(pipe.scheduler, name)) for name in read]
    diffratio.attach_(diffratio.apply_(pipe, diffratio.Dense()))
    assert [inspect.signature(getattr(pipe.scheduler, name)) for name in read] == signatures
    seen: list[tuple[SamplingRun | None, int, TokenGrid]] = []
    state = attachment(pipe.transformer)
    state.token_method.end_step = lambda output, ctx: seen.append((ctx.run, ctx.step, ctx.grid))  # type: ignore
    reads: list[int] = []
    backbone, flux = type(state.backbone), state.backbone
    state.backbone.grid_of = lambda *args: (reads.append(args[2] is None), backbone.grid_of(flux, *args))[1]  # type: ignore
    try:
        assert torch.equal(pictures(pipe, **size), dense)
    finally:
        del state.backbone.grid_of
    assert [step for _, step, _ in seen] == [0, 1, 2, 3]
    assert reads == [True, False, False, False]  # img_ids are read once
    run = seen[0][0]
    assert run is not None and run.guidance == "none" and {grid for _, _, grid in seen} == {TokenGrid(6, 4)}
    assert run.noise_levels == pytest.approx((pipe.scheduler.timesteps / 1000).tolist())
    pictures(pipe, num_inference_steps=4)
    expected = get_backbone("flux").default_run(pipe.transformer, 4).noise_levels
    assert (pipe.scheduler.timesteps / 1000).tolist() == pytest.approx(expected)


def test_guidance_beside_the_distilled_one_is_two_forwards_a_step() -> None:
    pipe = tiny_pipeline("flux")
    true = {"true_cfg_scale": 2.0, "negative_prompt": ["a cow", "a hen"]}
    diffratio.attach_(diffratio.apply_(pipe, diffratio.MoD(keep=0.55)))
    assert not torch.equal(pictures(pipe, **true), pictures(pipe))
    diffratio.remove_(pipe)
    diffratio.attach_(diffratio.apply_(pipe, diffratio.SDTM()))
    with pytest.raises(DiffratioError, match="sdtm keeps state .* true_cfg_scale above 1 makes two forwards"):
        pictures(pipe, **true)
    diffratio.remove_(pipe)
    diffratio.attach_(diffratio.apply_(pipe, diffratio.LiteUncond(keep=0.5)))
    with pytest.raises(DiffratioError, match="lite_uncond needs classifier-free guidance, and pipelines of flux"):
        pictures(pipe)


def test_the_size_may_not_change_within_a_run() -> None:
    pipe = tiny_pipeline("alpha")
    diffratio.attach_(diffratio.apply_(pipe, diffratio.Dense()))
    pipe.scheduler.set_timesteps(4)
    backbone, transformer = get_backbone("pixart"), pipe.transformer
    run = replace(run_of(pipe), text_tokens=3)
    for grid, fits in ((TokenGrid(6, 4), True), (GRID, False)):
        batch = backbone.example(transformer, 2, run=replace(run, grid=grid))
        if fits:
            transformer(**batch, timestep=torch.full((2,), 900.0))
            continue
        with pytest.raises(DiffratioError, match="open run is for a 6x4 token grid"):
            transformer(**batch, timestep=torch.full((2,), 900.0))


def test_size_conditions_of_large_alpha_models_reach_the_half_that_is_evaluated() -> None:
    """From 128x128 latents on alpha is told resolution and aspect ratio, by sample."""
    pipe = tiny_pipeline("alpha", sample_size=128)
    assert pipe.transformer.use_additional_conditions
    small = {"height": 16, "width": 16}
    dense = pictures(pipe, **small)
    diffratio.attach_(diffratio.apply_(pipe, diffratio.GuidanceInterval(skip=0.5)))
    cheaper = pictures(pipe, **small)
    assert cheaper.isfinite().all() and not torch.equal(cheaper, dense)
    diffratio.remove_(pipe)
    diffratio.attach_(diffratio.apply_(pipe, diffratio.MoD(keep=1.0)))
    assert torch.equal(pictures(pipe, **small), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_a_routed_export_samples_the_same(kind: str, tmp_path: Path) -> None:
    pipe = routed(kind)
    expected = pictures(pipe)
    folder = diffratio.export(pipe.transformer, tmp_path / "routed", pipeline=pipe)
    loaded = diffratio.load_pipeline(folder)
    assert type(loaded).__name__ == PIPELINES[kind].__name__
    assert is_applied(loaded.transformer)
    assert 'pipe(["a prompt"], num_inference_steps=' in (folder / "README.md").read_text(encoding="utf-8")
    assert torch.equal(pictures(loaded), expected)
    assert torch.equal(pictures(pipe), expected)  # the one that was exported stays as it was
    with pytest.raises((AttributeError, ImportError, OSError, ValueError)):
        DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


def test_a_routed_export_without_its_other_parts_takes_them_from_the_dense_pipeline(tmp_path: Path) -> None:
    pipe = routed()
    expected = pictures(pipe)
    folder = diffratio.export(pipe.transformer, tmp_path / "routed", scheduler=pipe.scheduler)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["scheduler", "transformer"]
    with pytest.raises(DiffratioError, match=r"lacks a text encoder.*parts="):
        diffratio.load_pipeline(folder)
    tiny_pipeline("alpha").save_pretrained(tmp_path / "dense")
    assert torch.equal(pictures(diffratio.load_pipeline(folder, parts=tmp_path / "dense")), expected)


def test_a_dense_export_loads_in_plain_diffusers(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sigma")
    pipe.save_pretrained(tmp_path / "saved")
    again = diffratio.load_pipeline(tmp_path / "saved")  # its parts know the folder that they came from
    folder = diffratio.export(again.transformer, tmp_path / "dense", pipeline=again)
    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert torch.equal(pictures(loaded), pictures(pipe))
    assert not any(str(tmp_path) in path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))


def test_bf16_reaches_every_part(tmp_path: Path) -> None:
    pipe = routed()
    folder = diffratio.export(pipe.transformer, tmp_path / "routed", pipeline=pipe)
    loaded = diffratio.load_pipeline(folder, dtype="bfloat16")
    assert {part.dtype for part in (loaded.vae, loaded.text_encoder)} == {torch.bfloat16}
    assert next(loaded.transformer.parameters()).dtype == torch.bfloat16
    assert loaded.transformer.transformer_blocks[0].router.weight.dtype == torch.float32
    assert pictures(loaded).isfinite().all()


def test_checkpoints_that_say_transformer2d_are_pixart(tmp_path: Path) -> None:
    """So do alpha's on the hub, with keys that the family's own class no longer has."""
    transformer = tiny_pipeline("alpha").transformer
    transformer.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    older = {"_class_name": "Transformer2DModel", "only_cross_attention": False, "num_vector_embeds": None}
    path.write_text(json.dumps(config | older), encoding="utf-8")
    loaded = diffratio.load_transformer(tmp_path / "old")
    assert type(loaded) is type(transformer)
    state = transformer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_a_hub_id_is_read_as_its_own_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformer = tiny_pipeline("sigma").transformer
    transformer.save_pretrained(tmp_path / "transformer")
    read, load = AutoModel.load_config, type(transformer).from_pretrained
    monkeypatch.setattr(AutoModel, "load_config", lambda name, **options: read(tmp_path, **options))
    monkeypatch.setattr(type(transformer), "from_pretrained", lambda name, **options: load(tmp_path, **options))
    loaded = diffratio.load_transformer("somebody/some-pixart")
    assert type(loaded) is type(transformer)
    state = transformer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_what_cannot_be_exported_or_loaded_says_so(tmp_path: Path) -> None:
    pipe, other = tiny_pipeline("alpha"), tiny_pipeline("alpha")
    with pytest.raises(DiffratioError, match="holds another transformer"):
        diffratio.export(pipe.transformer, tmp_path / "out", pipeline=other)
    with pytest.raises(DiffratioError, match="give a diffusers pipeline"):
        diffratio.export(pipe.transformer, tmp_path / "out", pipeline=object())
    with pytest.raises(DiffratioError, match="in place of vae"):
        diffratio.export(pipe.transformer, tmp_path / "out", pipeline=pipe, vae=pipe.vae)
    assert not (tmp_path / "out").exists()
    folder = diffratio.export(pipe.transformer, tmp_path / "out", pipeline=pipe)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "text_encoder").rename(folder / "elsewhere")
    with pytest.raises(DiffratioError, match="lacks text_encoder"):
        diffratio.load_pipeline(folder)
    (folder / "elsewhere").rename(folder / "text_encoder")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(DiffratioError, match="cannot be loaded"):
        diffratio.load_pipeline(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoPipeline"}), encoding="utf-8")
    with pytest.raises(DiffratioError, match="'NoPipeline' is no pipeline of diffusers"):
        diffratio.load_pipeline(folder)
    with pytest.raises(DiffratioError, match="has no other parts"):
        diffratio.load_pipeline("fashion-dit", parts=folder)
