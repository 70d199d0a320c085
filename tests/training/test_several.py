"""Families of several text encoders from end to end: precomputed, fine-tuned, exported, sampled and compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffratio
from diffratio import cli
from diffratio.backbones import get_backbone
from diffratio.conditions import EncoderSet, cached_captions, encode_captions, text_encoder
from diffratio.conditions.mapped import MappedCaptions
from diffratio.data.latents import LatentData
from diffratio.data.precompute import precompute
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import Latents, measuring, running
from diffratio.objectives import noise_levels, sample_draws
from diffratio.sampling.generate import generate, initial_noise
from diffratio.sampling.text import PixelTextPipeline
from diffratio.surgery import attachment
from diffratio.training.build import build_data, build_module
from diffratio.training.run import check, compose, plain_config, train
from diffratio.training.step import TrainingStep
from tests.captioned import captioned_parquet
from tests.evaluation.comparing import light, settings
from tests.text_pipelines import TEXT, tiny_pipeline
from tests.tiny_run import MODEL as FASHION
from tests.tiny_run import TINY, check_mixed

KINDS = ("sd3", "flux")
TOKENS = {"sd3": 77 + TEXT, "flux": TEXT}
PROMPTS = ["red bar", "blue dot"]
PIXELS = {
    "sd3": ["backbone=sd3_small", "num_attention_heads=2", "attention_head_dim=8", "in_channels=3", "out_channels=3",
            "num_layers=2", "dual_attention_layers=[0]", "joint_attention_dim=12", "caption_projection_dim=16",
            "pooled_projection_dim=6", "pos_embed_max_size=4", "sample_size=16", "patch_size=4"],
    "flux": ["backbone=flux_small", "num_attention_heads=2", "attention_head_dim=8", "axes_dims_rope=[2,2,4]",
             "in_channels=12", "num_layers=1", "num_single_layers=1", "joint_attention_dim=12",
             "pooled_projection_dim=4", "_token_side=8"],
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense pipeline, and latents and text states that it made; the folder is called after the family."""
    import datasets.config

    folder = tmp_path_factory.mktemp("several") / request.param
    tiny_pipeline(request.param, clip_tokens=77).save_pretrained(folder / "pipe")
    captioned_parquet(folder / "data", n=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        places = [f"data.source={folder / 'data'}", f"vae={folder / 'pipe'}", f"text={folder / 'pipe'}"]
        more = ["data=folder", "data.image_size=16", "data.caption_column=caption", "data.validation_split=validation"]
        sizes = [f"tokens={TOKENS[request.param]}", "device=cpu", f"out={folder / 'latents'}"]
        precompute(plain_config(compose("precompute", [*more, *places, *sizes])))
    return folder


def job(here: Path, run: str, *overrides: str) -> list[str]:
    """A job on latents."""
    own = [one for one in TINY if one not in FASHION and not one.startswith(("trainer.max", "trainer.val"))]
    notes = f"_text_tokens:{TOKENS[here.name]}" + (",_token_side:4" if here.name == "flux" else "")
    places = [f"data.source={here / 'latents'}", f"backbone.source={here / 'pipe'}", f"paths.output_dir={here / run}"]
    short = ["trainer.max_steps=3", "trainer.val_check_interval=3", f"backbone.config={{{notes}}}"]
    return ["data=precomputed", f"backbone={here.name}", "objective=flow", *own, *places, *short, *overrides]


@pytest.fixture(scope="module")
def routed(here: Path) -> Path:
    """Three steps of learned ratios with LoRA."""
    given = ["method=diffcr", "budget.target=0.8", "budget.steps=5", "lora=default", "lora.rank=2"]
    train(compose("train", job(here, "run", *given)))
    return here / "run" / "export"


def encoded(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """What the pipeline's own call hands to the transformer."""
    if isinstance(pipe, type(tiny_pipeline("sd3"))):
        found = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT)
        return found[0], found[2]
    found = pipe.encode_prompt(texts, max_sequence_length=TEXT)
    return found[0], found[1]


@torch.no_grad()
def test_conditions_are_what_the_pipeline_encodes(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding included: these models see it."""
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path))
    pipe = diffratio.load_pipeline(here / "pipe")
    texts = [*PROMPTS, "a letter more than fits"]
    with pytest.warns(UserWarning, match="is cut to the 12 that T5"):
        captions = cached_captions(texts, str(here / "pipe"), TOKENS[here.name], print)
    with monkeypatch.context() as patch:  # read from the cache, without loading an encoder
        patch.delattr(EncoderSet, "encode")
        again = cached_captions(texts, str(here / "pipe"), TOKENS[here.name], print)
    mapped = LatentData(str(here / "latents")).conditions
    assert isinstance(mapped, MappedCaptions) and mapped.encoder == captions.encoder
    wanted = encoded(pipe, [texts[1], "", texts[2], texts[0]])
    for own, numbers in ((captions, [1, 3, 2, 0]), (again, [1, 3, 2, 0]), (mapped, mapped.numbers([PROMPTS[1], ""]))):
        found = own.arguments(torch.tensor(numbers))
        assert set(found) == {"encoder_hidden_states", "pooled_projections"}
        for value, expected in zip(found.values(), wanted, strict=True):
            expected = expected[: len(numbers)]
            assert value.shape == expected.shape and torch.allclose(value, expected, atol=1e-3, rtol=1e-3)
    assert captions.encoder.pooled == wanted[1].shape[1] and wanted[1].abs().sum() > 0
    assert not torch.equal(wanted[0][1], wanted[0][3])
    first = torch.nn.functional.normalize(captions.arguments(torch.tensor([0]))["pooled_projections"], dim=1)[0]
    assert torch.allclose(captions.sentences()[0], first)


def test_other_encoders_are_another_set(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "pipe", tmp_path / "pipe")
    last = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}[here.name]
    own = text_encoder(str(here / "pipe"), TOKENS[here.name]).identity
    assert text_encoder(str(tmp_path / "pipe"), TOKENS[here.name]).identity == own  # wherever it lies
    other = getattr(tiny_pipeline(here.name), last)
    torch.nn.init.normal_(other.shared.weight)
    other.save_pretrained(tmp_path / "pipe" / last)
    assert text_encoder(str(tmp_path / "pipe"), TOKENS[here.name]).identity.revision != own.revision
    with pytest.raises(DiffratioError, match="encoder of .* is of revision") as caught:
        check(compose("train", job(here, "unused", f"backbone.source={tmp_path / 'pipe'}")))
    assert "\n" not in str(caught.value)
    data = LatentData(str(here / "latents"))
    pipe = diffratio.load_pipeline(tmp_path / "pipe")
    with pytest.raises(DiffratioError, match="encoders of revision|reads .* tokens"):
        data.check_pipeline(pipe, str(tmp_path / "pipe"))
    shutil.rmtree(tmp_path / "pipe" / last)
    with pytest.raises(DiffratioError, match=f"lacks {last}"):
        text_encoder(str(tmp_path / "pipe"), TOKENS[here.name])
    with pytest.raises(DiffratioError, match="tokens together, asked for 600"):
        text_encoder(str(here / "pipe"), 600)


def test_loss_and_gradient_are_those_of_the_pipelines_own_packing(here: Path) -> None:
    """At its dense start a routed job computes what a script around the pipeline's parts does."""
    cfg = plain_config(compose("train", job(here, "unused", "method=diffcr", "data.label_dropout=0.5")))
    data = build_data(cfg)
    batch = next(iter(data.train_dataloader()))
    module = build_module(cfg, data)
    TrainingStep(module, "cpu")  # stands for a Trainer
    loss = module.training_step(batch, 0)
    loss.backward()

    pipe = diffratio.load_pipeline(here / "pipe")
    model, clean = pipe.transformer, batch["images"]
    uniform, noise = sample_draws(module.loss.seed, batch["positions"].tolist(), clean.shape[1:])
    levels = noise_levels(module.objective, uniform, batch["positions"].tolist(), len(clean), "stratified", 4)
    captions: Any = data.conditions
    assert captions.null in batch["labels"]
    with torch.no_grad():
        states, pooled = encoded(pipe, [[*captions.texts, ""][label] for label in batch["labels"].tolist()])
    sigma = levels[:, None, None, None]
    noised = (1 - sigma) * clean + sigma * noise
    given = {"encoder_hidden_states": states, "pooled_projections": pooled, "return_dict": False}
    if here.name == "sd3":
        output = model(noised, timestep=1000 * levels, **given)[0]
    else:
        size = len(clean), clean.shape[1], 8, 8
        ids = pipe._prepare_latent_image_ids(len(clean), 4, 4, "cpu", torch.float32)
        output = model(
            pipe._pack_latents(noised, *size), timestep=levels, guidance=torch.ones(len(clean)), img_ids=ids,
            txt_ids=torch.zeros(TEXT, 3), **given,
        )[0]  # fmt: skip
        output = pipe._unpack_latents(output, 16, 16, 2)
    wanted = (output - (noise - clean)).square().mean()
    wanted.backward()
    assert torch.allclose(loss, wanted, rtol=1e-3)
    routed, count = dict(module.transformer.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-3:
            found = routed[name].grad
            assert found is not None, name
            close = torch.nn.functional.cosine_similarity(found.flatten(), parameter.grad.flatten(), dim=0)
            assert close > 0.999 and torch.allclose(found.norm(), parameter.grad.norm(), rtol=2e-2), name
            count += 1
    assert count > 20


def test_a_run_is_sampled_by_the_dense_pipelines_parts(
    here: Path, routed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((routed / "card.json").read_text())
    assert (card["text"], card["objective"]) == (None, "flow") and card["sampler"]["name"] == "flow_euler"
    assert card["sampler"]["guidance_scale"] == {"sd3": 7.0, "flux": 3.5}[here.name]
    assert len(list((here / "run" / "pictures").glob("samples-*.png"))) == 1
    pipe = diffratio.load_pipeline(routed, parts=here / "pipe")
    assert type(pipe).__name__ == type(tiny_pipeline(here.name)).__name__
    assert diffratio.macs(pipe.transformer, steps=5).fraction < 0.81
    pictures = generate(pipe, 2, labels=PROMPTS, steps=3, quiet=True)
    assert pictures.shape == (2, 3, 16, 16) and not torch.equal(pictures[0], pictures[1])
    alone = generate(pipe, 1, labels=PROMPTS[1:], steps=3, quiet=True, start=1)
    assert torch.allclose(alone[0], pictures[1], atol=1e-4)
    words = ["sample", str(routed), "--prompts", *PROMPTS, "--steps", "3", "--json", "--parts", str(here / "pipe")]
    assert cli.main([*words, "--out", str(here / "grid.png")]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2


def test_generate_is_the_pipeline_on_its_own_noise(here: Path) -> None:
    pipe = diffratio.load_pipeline(here / "pipe")
    backbone = get_backbone(here.name)
    backbone.set_text_tokens_(pipe.transformer, TOKENS[here.name])
    found = generate(pipe, 2, labels=PROMPTS, steps=3, guidance_scale=4.5, quiet=True)
    for i, prompt in enumerate(PROMPTS):
        noise = initial_noise(0, [i], (4, 8, 8))
        if here.name == "flux":
            noise = pipe._pack_latents(noise, 1, 4, 8, 8)
        wanted = pipe(
            prompt, latents=noise, num_inference_steps=3, guidance_scale=4.5, height=16, width=16,
            max_sequence_length=TEXT, output_type="pt",
        ).images[0]  # fmt: skip
        assert torch.allclose(found[i], wanted * 2 - 1, atol=1e-4)


def test_a_comparison_takes_losses_on_latents(
    here: Path, routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
    light(monkeypatch, tmp_path)
    dense = tmp_path / "dense"
    shutil.copytree(here / "pipe", dense)
    path = dense / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_text_tokens": TOKENS[here.name]}))
    data = LatentData(str(here / "latents"))
    changes = {"routed": [str(routed)], "budgets": [0.9], "train_n": 0, "guidance_scale": 3.5, "steps": 4}
    cfg = settings({"dense": str(dense)}, tmp_path / "out", **changes)
    seen: dict[str, Any] = {}
    opened, trace = running.line_up, measuring.mask_overlays

    def line_up(*args: Any) -> Any:
        seen["lineup"] = opened(*args)
        return seen["lineup"]

    monkeypatch.setattr(running, "line_up", line_up)

    def draw(*args: Any, **options: Any) -> Any:
        seen["drawn"] = seen.get("drawn") or trace(*args, **options)
        return []

    monkeypatch.setattr(measuring, "mask_overlays", draw)
    answer = running.compare_from_config(
        cfg, data.held_out_pictures, conditions=data.conditions, latents=Latents(data.held_out, data.check_pipeline)
    )
    rows = {row["arm"]: row for row in answer["arms"]}
    assert len(rows) == 3 and all(row["status"] == "ok" for row in rows.values()), rows
    assert rows["tome"]["excess_loss"] != 0 and abs(rows["tome"]["macs_fraction"] - 0.9) < 0.011
    lineup = seen["lineup"]
    assert lineup.objective == "flow" and seen["drawn"]
    levels: list[tuple[float, ...]] = []
    arm = next(one for one in lineup.contenders if one.arm.name == "tome")
    method = attachment(arm.pipe.transformer).token_method
    ended = method.end_step
    method.end_step = lambda output, ctx: (levels.append(ctx.run.noise_levels), ended(output, ctx))[1]
    generate(arm.pipe, 1, labels=PROMPTS[:1], steps=4, quiet=True, guidance_scale=3.5)
    assert levels[0] == pytest.approx(lineup.run.noise_levels, abs=1e-6)  # what the costs were solved on


def test_pixels_are_trained_and_sampled_by_the_same_encoders(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path / "cache"))
    model, *sizes = PIXELS[here.name]
    own = [one for one in TINY if one not in FASHION and not one.startswith(("trainer.max", "trainer.val"))]
    tokens = TOKENS[here.name]
    given = [
        model, "data=emoji64", "objective=flow", *own, *(f"++backbone.config.{size}" for size in sizes),
        f"data.source={here / 'data'}", f"data.text.encoder={here / 'pipe'}", f"data.text.tokens={tokens}",
        "data.image_size=16", "trainer.max_steps=2",
        "trainer.val_check_interval=2", f"paths.output_dir={tmp_path / 'run'}", "method=diffcr", "budget.target=0.9",
    ]  # fmt: skip
    train(compose("train", given))
    folder = tmp_path / "run" / "export"
    card = json.loads((folder / "card.json").read_text())
    assert card["text"]["tokens"] == tokens and card["text"]["pooled"] in (4, 6)
    pipe = diffratio.load_pipeline(folder)
    assert isinstance(pipe, PixelTextPipeline)
    pictures = generate(pipe, 2, labels=PROMPTS, steps=3, quiet=True)
    assert pictures.shape == (2, 3, 16, 16) and not torch.equal(pictures[0], pictures[1])
    capsys.readouterr()
    words = ["sample", str(folder), "--prompts", *PROMPTS, "--steps", "2", "--json"]
    assert cli.main([*words, "--out", str(tmp_path / "grid.png")]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2

    shutil.copytree(here / "pipe", tmp_path / "pipe")
    other = tiny_pipeline(here.name).text_encoder
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "pipe" / "text_encoder")
    moved = PixelTextPipeline(
        pipe.transformer, pipe.scheduler, dataclasses.replace(pipe.text, name=str(tmp_path / "pipe")).to_json()
    )
    with pytest.raises(DiffratioError, match="what is here is"):
        moved.encode(["red"])


@torch.no_grad()
def test_a_pixel_pipeline_equals_a_loop_written_out(here: Path) -> None:
    """Guidance: two halves, or an input of the model."""
    from diffratio.sampling.schedulers import make_scheduler

    model, *sizes = PIXELS[here.name]
    tokens = TOKENS[here.name]
    given = [model, *(f"++backbone.config.{size}" for size in sizes)]
    cfg = plain_config(compose("train", given))["backbone"]["config"]
    backbone = get_backbone(here.name)
    torch.manual_seed(0)
    transformer: Any = backbone.from_config({key: value for key, value in cfg.items() if key[:1] != "_"}).eval()
    if here.name == "flux":
        transformer.register_to_config(_token_side=8)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    identity = text_encoder(str(here / "pipe"), tokens).identity
    pipe = PixelTextPipeline(transformer, make_scheduler("flow_euler"), identity.to_json())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 16, 16)
    found = pipe(PROMPTS, 2.5, 4, latents=noise, output_type="pt").images * 2 - 1
    x, levels = noise.clone(), [1.0, 0.75, 0.5, 0.25, 0.0]
    dense = diffratio.load_pipeline(here / "pipe")
    texts, none = encoded(dense, PROMPTS), encoded(dense, ["", ""])

    def predict(level: float, text: tuple[Tensor, Tensor]) -> Tensor:
        given = {"encoder_hidden_states": text[0].half().float(), "pooled_projections": text[1].half().float()}
        if here.name == "sd3":
            return transformer(x, timestep=torch.full((2,), 1000 * level), **given, return_dict=False)[0]  # type: ignore[no-any-return]
        ids = dense._prepare_latent_image_ids(2, 8, 8, "cpu", torch.float32)
        output = transformer(
            dense._pack_latents(x, 2, 3, 16, 16), timestep=torch.full((2,), level), guidance=torch.full((2,), 2.5),
            img_ids=ids, txt_ids=torch.zeros(TEXT, 3), **given, return_dict=False,
        )[0]  # fmt: skip
        return dense._unpack_latents(output, 32, 32, 2)  # type: ignore[no-any-return]

    for level, following in zip(levels, levels[1:], strict=False):
        output = predict(level, texts)
        if here.name == "sd3":
            free = predict(level, none)
            output = free + 2.5 * (output - free)
        x = x + (following - level) * output
    assert torch.allclose(found, x.clamp(-1, 1), atol=1e-4)
    assert not torch.equal(found[0], pipe(PROMPTS, 1.0, 4, latents=noise, output_type="pt").images[0] * 2 - 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=noise"], {"flux": "predicts flow, flow_sample; set objective=flow", "sd3": "set objective=flow"}),
        (["backbone.config={_text_tokens:40}"], {kind: "reads 40; precompute it with" for kind in KINDS}),
        (["backbone.config={SIZES,pooled_projection_dim:9}"], {kind: "pooled states of 9" for kind in KINDS}),
        (["inpaint=default"], {kind: "inpaint masks pictures" for kind in KINDS}),
    ],
)
def test_what_does_not_fit_is_one_line(here: Path, overrides: list[str], message: dict[str, str]) -> None:
    sizes = {
        "sd3": "in_channels:4,num_layers:1,sample_size:8,joint_attention_dim:12",
        "flux": "in_channels:16,num_layers:1,num_single_layers:1,joint_attention_dim:12,_token_side:4",
    }
    own = job(here, "unused", "method=diffcr")
    if any("SIZES" in one for one in overrides):
        own = [one for one in own if not one.startswith("backbone.config")]
    given = [one.replace("SIZES", sizes[here.name]) for one in overrides]
    with pytest.raises(DiffratioError, match=message[here.name]) as caught:
        check(compose("train", [*own, *given]))
    assert "\n" not in str(caught.value)


def test_mixed_precision_trains_and_samples(here: Path) -> None:
    given = ["method=diffcr", "budget.steps=5", "lora=default", "lora.rank=2"]
    check_mixed(lambda run: job(here, run, *given), here)


def test_autocast_changes_no_caption(here: Path) -> None:
    """Previews sample in the run's precision, and their prompts must be what was trained on."""
    encoder = text_encoder(str(here / "pipe"), TOKENS[here.name])
    alone = encode_captions(PROMPTS, encoder)
    with torch.autocast("cpu", torch.bfloat16):
        again = encode_captions(PROMPTS, encoder)
    assert torch.equal(again.states, alone.states)
