"""Latent space from end to end: precomputed latents, a routed run, its export, samples and comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import diffratio
from diffratio import cli
from diffratio.data.latents import LatentData
from diffratio.data.precompute import precompute
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import Latents, measuring, running
from diffratio.sampling.generate import generate
from diffratio.training.run import check, compose, plain_config, train
from tests.captioned import captioned_parquet
from tests.evaluation.comparing import PooledPixels, settings
from tests.text_pipelines import tiny_pipeline
from tests.tiny_run import MODEL as FASHION
from tests.tiny_run import TINY, check_mixed

PROMPTS = ["red bar", "blue dot"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense pipeline, latents that it made, and a routed run on them."""
    import datasets.config

    folder = tmp_path_factory.mktemp("latent")
    tiny_pipeline("alpha").save_pretrained(folder / "pipe")
    captioned_parquet(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        places = [f"data.source={folder / 'data'}", f"vae={folder / 'pipe'}", f"text={folder / 'pipe'}"]
        more = ["data=folder", "data.image_size=16", "data.caption_column=caption", "data.validation_split=validation"]
        precompute(plain_config(compose("precompute", [*more, *places, f"out={folder / 'latents'}", "device=cpu"])))
    train(compose("train", job(folder, "run", "method=diffcr", "budget.target=0.8", "callbacks.pictures_every=4")))
    return folder


def job(here: Path, run: str, *overrides: str) -> list[str]:
    own = [one for one in TINY if one not in FASHION]
    places = [f"data.source={here / 'latents'}", f"backbone.source={here / 'pipe'}"]
    words = ["data=precomputed", "backbone=pixart", "objective=noise", f"paths.output_dir={here / run}"]
    return [*words, *own, *places, *overrides]


def test_a_run_is_sampled_by_the_dense_pipelines_parts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list((here / "run" / "pictures").glob("samples-*.png"))) == 2
    card = json.loads((here / "run" / "export" / "card.json").read_text())
    assert (card["text"], card["data"], card["objective"]) == (None, "folder", "noise")
    assert card["sampler"]["name"] == "dpm_solver"  # the dense pipeline's own
    pipe = diffratio.load_pipeline(here / "run" / "export", parts=here / "pipe")
    assert diffratio.macs(pipe.transformer, steps=20).fraction < 0.81
    pictures = generate(pipe, 2, labels=PROMPTS, steps=3, quiet=True)
    assert pictures.shape == (2, 3, 16, 16) and not torch.equal(pictures[0], pictures[1])
    alone = generate(pipe, 1, labels=PROMPTS[1:], steps=3, quiet=True, start=1)
    assert torch.allclose(alone[0], pictures[1], atol=1e-5)
    words = ["sample", str(here / "run" / "export"), "--prompts", *PROMPTS, "--steps", "3", "--json"]
    assert cli.main([*words, "--parts", str(here / "pipe"), "--out", str(here / "grid.png")]) == 0
    assert cli.main([*words, "--out", str(here / "grid.png")]) == 2
    assert "parts" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_generate_is_the_pipeline_on_its_own_noise(kind: str) -> None:
    from diffratio.sampling.generate import initial_noise

    pipe = tiny_pipeline(kind)
    found = generate(pipe, 2, labels=PROMPTS, steps=3, guidance_scale=4.5, quiet=True)
    for i, prompt in enumerate(PROMPTS):
        wanted = pipe(
            prompt, latents=initial_noise(0, [i], (4, 8, 8)), num_inference_steps=3, guidance_scale=4.5,
            max_sequence_length=120, use_resolution_binning=False, clean_caption=False, output_type="pt",
        ).images[0]  # fmt: skip
        assert torch.allclose(found[i], wanted * 2 - 1, atol=1e-4)
    with pytest.raises(DiffratioError, match="sampled by prompts, got 3"):
        generate(pipe, 1, labels=[3], steps=3, quiet=True)


def test_a_comparison_takes_losses_on_latents_and_features_on_pictures(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
    monkeypatch.setattr(running, "Lite0Features", PooledPixels)
    monkeypatch.setattr(measuring, "mask_overlays", lambda *args, **kwargs: [])
    data = LatentData(str(here / "latents"))
    changes = {"routed": [str(here / "run" / "export")], "train_n": 0}
    cfg = settings({"dense": str(here / "pipe")}, tmp_path / "out", **changes)
    answer = running.compare_from_config(
        cfg, data.held_out_pictures, conditions=data.conditions, latents=Latents(data.held_out, data.check_pipeline)
    )
    rows = {row["arm"]: row for row in answer["arms"]}
    assert len(rows) == 3 and all(row["status"] == "ok" for row in rows.values()), rows
    assert rows["tome"]["excess_loss"] != 0 and abs(rows["tome"]["macs_fraction"] - 0.8) < 0.011
    record = json.loads(next((tmp_path / "out" / "records").glob("dense*.json")).read_text())
    assert record["images"]["labels"][0] in data.conditions.texts  # type: ignore[attr-defined]


def test_large_alpha_models_are_told_the_size_of_the_sample() -> None:
    from diffratio.backbones import get_backbone

    family = get_backbone("pixart")
    model = family.tiny(sample_size=128, in_channels=4, out_channels=8).eval()
    given = family.example(model, 2, run=family.default_run(family.tiny(), 1))
    inputs, sizes = given.pop("hidden_states"), given.pop("added_cond_kwargs")
    assert sizes["resolution"].tolist() == [[64.0, 64.0]] * 2 and sizes["aspect_ratio"].tolist() == [[1.0]] * 2
    time = torch.full((2,), 500.0)
    found = family.predict(model, inputs, time, given)
    assert torch.equal(found, family.predict(model, inputs, time, given | {"added_cond_kwargs": sizes}))
    other = {"resolution": 2 * sizes["resolution"], "aspect_ratio": sizes["aspect_ratio"]}
    assert not torch.equal(found, family.predict(model, inputs, time, given | {"added_cond_kwargs": other}))


def test_check_needs_no_vae(here: Path, tmp_path: Path) -> None:
    found = check(compose("train", job(here, "unused", "method=diffcr")))
    assert found["tokens"] == 16 and found["budget"]["reachable"][0] < 0.8


def changed(here: Path, out: Path, file: str, **changes: Any) -> Path:
    """A copy of the dense pipeline with other values in a JSON file."""
    shutil.copytree(here / "pipe", out)
    document = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps(document | changes))
    return out


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vae/config.json", {"scaling_factor": 0.5}, "has 4 channels, scale 0.5"),
        ("vae/config.json", {"shift_factor": 0.3}, "shift 0.3"),
        ("transformer/config.json", {"sample_size": 16}, "precompute them with data.image_size=32"),
        ("transformer/config.json", {"in_channels": 8}, "the model takes 8"),
        ("transformer/config.json", {"caption_channels": 9}, "takes 9 channels a token"),
        ("transformer/config.json", {"_text_tokens": 60}, "reads 60; precompute it with tokens=60"),
        ("model_index.json", {"_class_name": "PixArtSigmaPipeline"}, "reads 300"),
    ],
)
def test_models_that_latents_do_not_fit(
    here: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    pipe = changed(here, tmp_path / "pipe", file, **changes)
    with pytest.raises(DiffratioError, match=message) as caught:
        check(compose("train", job(here, "unused", "method=diffcr", f"backbone.source={pipe}")))
    assert "\n" not in str(caught.value)


def test_other_encoders_objectives_and_backbones_are_refused(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "pipe", tmp_path / "pipe")
    other = tiny_pipeline("alpha")
    torch.nn.init.normal_(other.text_encoder.shared.weight)
    other.text_encoder.save_pretrained(tmp_path / "pipe" / "text_encoder")
    own = job(here, "unused", "method=diffcr")
    with pytest.raises(DiffratioError, match="is of revision"):
        check(compose("train", [*own, f"backbone.source={tmp_path / 'pipe'}"]))
    with pytest.raises(DiffratioError, match="set objective=noise"):
        check(compose("train", [*own, "objective=flow"]))
    with pytest.raises(DiffratioError, match="captions, and the model 10 classes"):
        words = ["backbone=dit_fashion", "backbone.source=null", "backbone.config.in_channels=4"]
        check(compose("train", [*own, *words, "backbone.config.sample_size=8"]))
    data = LatentData(str(here / "latents"))
    with pytest.raises(DiffratioError, match="encoder of revision"):
        data.check_pipeline(diffratio.load_pipeline(tmp_path / "pipe"), str(tmp_path / "pipe"))
    torch.nn.init.normal_(other.vae.decoder.conv_in.weight)
    with pytest.raises(DiffratioError, match="were made by vae"):
        data.check_pipeline(other, "other")


def test_mixed_precision_trains_and_samples(here: Path) -> None:
    check_mixed(lambda run: job(here, run, "method=diffcr", "budget.steps=5"), here)
