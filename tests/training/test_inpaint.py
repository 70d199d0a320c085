"""Inpainting from a dense text-to-image base to a routed checkpoint, its samples and its comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffratio
from diffratio import cli
from diffratio.backbones import get_backbone
from diffratio.backbones.widening import inpaints, widen_
from diffratio.data.decode import decode
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import running
from diffratio.inpainting import InpaintSettings, Known, Masks
from diffratio.objectives import FlowMatching, NoisePrediction
from diffratio.objectives.validation import part_losses, region_losses
from diffratio.sampling.generate import generate
from diffratio.sampling.known import known_of, read_pictures
from diffratio.training.build import build_data, build_module
from diffratio.training.run import compose, export_run, plain_config, train
from tests.captioned import MODEL, captioned_parquet, tiny_encoder
from tests.evaluation.comparing import light, settings
from tests.tiny_run import MODEL as FASHION
from tests.tiny_run import TINY, check_mixed, column


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inpainting")
    tiny_encoder(folder / "tiny-bert")
    captioned_parquet(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def _cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))


def job(here: Path, run: str, *overrides: str) -> list[str]:
    """Overrides of a tiny job that fills holes."""
    own = [one for one in TINY if one not in FASHION]
    places = [f"data.source={here / 'data'}", f"data.text.encoder={here / 'tiny-bert'}"]
    few = ["trainer.max_steps=4", "trainer.val_check_interval=2", "inpaint=default"]
    return [*MODEL, *own, *places, f"paths.output_dir={here / run}", *few, *overrides]


def trained(here: Path, run: str, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
        train(compose("train", job(here, run, *overrides)))
    return here / run / "export"


@pytest.fixture(scope="module")
def plain(here: Path) -> Path:
    """A dense text-to-image checkpoint that fills no holes."""
    return trained(here, "plain", "method=dense", "inpaint=none", "trainer.max_steps=1")


@pytest.fixture(scope="module")
def filling(here: Path, plain: Path) -> Path:
    """The same, fine-tuned for inpainting."""
    return trained(here, "filling", "method=dense", f"backbone.source={plain}", "inpaint.loss=hole")


@pytest.fixture(scope="module")
def routed(here: Path, filling: Path) -> Path:
    """Routed fine-tuning of a model that fills holes already."""
    own = ["method=diffcr", "method.router_sees_mask=true", f"backbone.source={filling}", "inpaint.loss=hole"]
    return trained(here, "routed", *own)


def known(n: int, seed: int = 0) -> Known:
    generator = torch.Generator().manual_seed(seed)
    return Known(torch.rand(n, 3, 16, 16, generator=generator) * 2 - 1, Masks(InpaintSettings(), 16, 0).fixed(range(n)))


def test_fine_tuning_starts_at_the_base(here: Path, plain: Path) -> None:
    cfg = plain_config(compose("train", job(here, "unused", "method=dense", f"backbone.source={plain}")))
    module = build_module(cfg, build_data(cfg))
    base = diffratio.load_transformer(plain)
    x, levels, labels = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    module.transformer.eval()
    with torch.no_grad():
        wide = module.predict(torch.cat([x, known(3).channels], 1), levels, labels)
        alone = module._forward(base, x, levels, labels)
    assert torch.equal(wide, alone)


def test_a_run_reports_both_parts_and_draws_triples(here: Path, filling: Path) -> None:
    result = json.loads((here / "filling" / "result.json").read_text())
    assert set(result["val_loss_parts"]) == {"hole", "known"}
    assert result["val_loss"] == result["val_loss_parts"]["hole"] != result["val_loss_parts"]["known"]
    logged = {name: column(here / "filling", f"val/{name}") for name in ("loss", "loss_hole", "loss_known")}
    assert logged["loss"] == logged["loss_hole"] and len(logged["loss_known"]) == 2
    card = diffratio.checkpoint.read_card(filling)
    assert card.inpaint == InpaintSettings(loss="hole")
    drawn = np.asarray(Image.open(next((here / "filling" / "pictures").glob("samples-*.png"))))
    assert drawn.shape[:2] == (16 * 3, (6 * 17 - 1) * 3)  # two samples: original, masked, filled


def test_the_loss_in_the_hole_by_hand() -> None:
    """A constant error of 1 in the hole and of 2 outside."""
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, 0] = 1

    def off(target: torch.Tensor) -> torch.Tensor:
        return target + torch.where(mask > 0.5, 1.0, 2.0)

    objective, clean, noise = FlowMatching(), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def predict(inputs: torch.Tensor, levels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert inputs.shape == (2, 7, 4, 4) and torch.equal(inputs[:, 6:], mask)
        u = levels[:, None, None, None]
        return off((inputs[:, :3] - clean) / u)  # x_u = x_0 + u (e - x_0)

    found = part_losses(predict, objective, clean, torch.zeros(2), masks=mask)
    for part, value in (("hole", 1.0), ("known", 4.0), ("all", (4 * 1 + 12 * 4) / 16)):
        assert torch.allclose(found[part], torch.full((2, 4), value), atol=1e-3), part
    assert torch.equal(found["hole"], region_losses(predict, objective, clean, torch.zeros(2), masks=mask, part="hole"))
    noised = NoisePrediction().noised(clean, noise, torch.tensor([0.2, 0.7]))
    inside = dataclasses.replace(noised, where=mask)
    output = off(noise)
    assert torch.allclose(NoisePrediction().losses(output, inside), torch.ones(2), atol=1e-5)
    learned = torch.cat([output, torch.randn(2, 3, 4, 4)], 1)
    elsewhere = learned.clone()
    elsewhere[:, :, 1:] += 5
    assert torch.equal(NoisePrediction().losses(learned, inside), NoisePrediction().losses(elsewhere, inside))
    assert not torch.equal(NoisePrediction().losses(learned, noised), NoisePrediction().losses(elsewhere, noised))
    with pytest.raises(DiffratioError, match="part of the pictures 'hole'"):
        region_losses(predict, objective, clean, torch.zeros(2), part="hole")


def test_training_sees_the_hole_and_counts_it(here: Path, filling: Path) -> None:
    """The module's inputs are picture, masked picture and mask; the loss is that of the hole."""
    cfg = plain_config(
        compose("train", job(here, "unused", "method=dense", f"backbone.source={filling}", "inpaint.loss=hole"))
    )
    data = build_data(cfg)
    module = build_module(cfg, data)
    batch = next(iter(data.train_dataloader()))
    noised = module.objective.noised(batch["images"], torch.randn_like(batch["images"]), torch.full((8,), 0.5))
    inputs, counted = module._seen(noised, batch["masks"])
    hidden = batch["images"].masked_fill(batch["masks"].bool(), 0.0)
    assert torch.equal(inputs, torch.cat([noised.inputs, hidden, batch["masks"]], 1))
    assert counted.where is not None and torch.equal(counted.where, batch["masks"])


@pytest.mark.parametrize("paste", [True, False])
def test_the_pipeline_equals_a_loop_written_out(filling: Path, paste: bool) -> None:
    pipe: Any = diffratio.load_pipeline(filling)
    noise, given = torch.randn(2, 3, 16, 16), known(2)
    answer = pipe(["red bar", "blue dot"], 2.5, 4, latents=noise, output_type="pt", image=given.images,
                  mask=given.masks, paste=paste)  # fmt: skip
    x, levels = noise.clone(), [1.0, 0.75, 0.5, 0.25, 0.0]
    prompts, none = pipe.encode(["red bar", "blue dot"]), pipe.encode([""] * 2)
    hidden = given.images.masked_fill(given.masks.bool(), 0.0)
    for level, following in zip(levels, levels[1:], strict=False):
        time, seen = torch.full((2,), 1000 * level), torch.cat([x, hidden, given.masks], 1)
        with torch.no_grad():
            wanted, free = (
                pipe.transformer(seen, timestep=time, **one, return_dict=False)[0] for one in (prompts, none)
            )
        x = x + (following - level) * (free + 2.5 * (wanted - free))
    if paste:
        x = given.masks * x + (1 - given.masks) * given.images
    assert torch.allclose(answer.images * 2 - 1, x.clamp(-1, 1), atol=1e-4)
    outside = (1 - given.masks).bool().expand_as(x)
    assert torch.allclose((answer.images * 2 - 1)[outside], given.images[outside], atol=1e-6) == paste


def test_pictures_of_pil_are_the_same_as_tensors(filling: Path) -> None:
    pipe: Any = diffratio.load_pipeline(filling)
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8] = 255
    noise = torch.randn(2, 3, 16, 16)
    common: dict[str, Any] = {"num_inference_steps": 2, "latents": noise, "output_type": "pt"}
    found = pipe(["red bar", "a"], image=Image.fromarray(array), mask=Image.fromarray(mask), **common).images
    picture = (torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1)[None].expand(2, -1, -1, -1)
    hole = (torch.from_numpy(mask) > 0).float()[None, None]
    assert torch.equal(found, pipe(["red bar", "a"], image=picture, mask=hole, **common).images)


def test_pictures_are_read_as_training_reads_them(tmp_path: Path) -> None:
    """Transparent pixels are white, and what a camera has turned is upright."""
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    array[..., 3] = 255 * (array[..., 3] > 127)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "a.png", exif=turned)
    (picture,) = read_pictures([str(tmp_path / "a.png")])
    assert picture.size == (4, 6)
    read = decode({"bytes": None, "path": str(tmp_path / "a.png")}, size=(6, 4), channels=3, pad=False)
    assert (read == 255).all(0).any()
    transformer = widen_(get_backbone("dit").tiny(in_channels=3, out_channels=3), 7)
    known = known_of(transformer, picture, torch.ones(1, 1, 6, 4), 1)
    assert known is not None
    torch.testing.assert_close(known.images[0], torch.from_numpy(read).float() / 127.5 - 1)


def test_a_routed_checkpoint_fills_holes_alone_as_in_a_batch(routed: Path) -> None:
    pipe: Any = diffratio.load_pipeline(routed)
    assert all(block.router.hole.item() != 0 for block in pipe.transformer.transformer_blocks)  # it has learned
    assert inpaints(pipe.transformer) and diffratio.macs(pipe.transformer, steps=20).fraction < 0.81
    prompts, given = ["red bar", "blue dot", "red bar"], known(3)
    pictures = generate(pipe, 3, labels=prompts, steps=3, quiet=True, known=given)
    alone = generate(pipe, 1, labels=["blue dot"], steps=3, quiet=True, start=1, known=given.take([1]))
    assert torch.allclose(alone[0], pictures[1], atol=1e-5)
    outside = (1 - given.masks).bool().expand_as(pictures)
    assert torch.allclose(pictures[outside], given.images[outside], atol=1e-6)


def test_a_comparison_gives_all_arms_the_same_holes(
    here: Path, filling: Path, routed: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch, tmp_path)
    cfg = plain_config(compose("train", job(here, "unused")))
    data = build_data(cfg)
    changes = {"methods": ["tome"], "routed": [str(routed)], "weights": str(filling), "train_n": 0}
    given = settings({"dense": str(filling)}, tmp_path / "out", **changes)
    answer = running.compare_from_config(given, data.held_out, conditions=data.conditions)
    rows = {row["arm"]: row for row in answer["arms"]}
    assert len(rows) == 3 and all(row["status"] == "ok" for row in rows.values()), rows
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    for record in records:
        assert {"hole_psnr", "hole_ssim", "hole_feature_distance"} <= set(record["quality"])
        assert 0 < record["quality"]["hole_psnr"]["value"] < 40
    assert len({record["quality"]["hole_psnr"]["value"] for record in records}) == 3
    assert "masks" in json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]
    mixed = settings({"dense": str(plain)}, tmp_path / "mixed", routed=[str(routed)], methods=[], train_n=0)
    with pytest.raises(DiffratioError, match="compare checkpoints of one kind"):
        running.compare_from_config(mixed, data.held_out, conditions=data.conditions)


def test_the_command_line_fills_pictures(
    here: Path, filling: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8)).save(here / "picture.png")
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(here / "small.png")
    picture, out = str(here / "picture.png"), str(here / "grid.png")

    def sample(folder: Path, *more: str) -> tuple[int, str]:
        code = cli.main(["sample", str(folder), "--prompts", "red bar", "a", "--steps", "2", "--out", out, *more])
        return code, capsys.readouterr().err

    assert sample(filling, "--image", picture, "--mask", "boxes")[0] == 0
    assert np.asarray(Image.open(out)).shape[:2] == (16 * 3, (6 * 17 - 1) * 3)
    assert sample(filling, "--image", picture)[0] == 0
    for folder, more, message in (
        (filling, ["--image", picture, "--mask", str(here / "small.png")], "8x8 and the pictures are 16x16"),
        (filling, ["--image", str(here / "small.png")], "small.png' is 8x8, and"),
        (filling, ["--image", "missing.png"], "'missing.png' cannot be read"),
        (plain, ["--image", picture], "is no inpainting model"),
    ):
        code, error = sample(folder, *more)
        assert code == 2 and message in error and error.count("\n") == 1, error


def test_a_finished_run_exports_again(here: Path, routed: Path, tmp_path: Path) -> None:
    export_run(str(here / "routed"), str(tmp_path / "again"), None)
    first, again = diffratio.load_transformer(routed), diffratio.load_transformer(tmp_path / "again")
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_pipelines_refuse_what_does_not_fit(filling: Path, plain: Path) -> None:
    filler: Any = diffratio.load_pipeline(filling)
    painter: Any = diffratio.load_pipeline(plain)
    given = known(1)
    with pytest.raises(DiffratioError, match="image and mask is missing"):
        filler("red bar")
    with pytest.raises(DiffratioError, match="and mask is missing"):
        filler("red bar", image=given.images)
    with pytest.raises(DiffratioError, match="mask: for inpainting models"):
        painter("red bar", mask=given.masks)
    with pytest.raises(DiffratioError, match="the mask is 8x8 and the picture 16x16"):
        filler("red bar", image=given.images, mask=given.masks[:, :, :8, :8])
    with pytest.raises(DiffratioError, match="picture to inpaint is 8x8 and the sample is 16x16"):
        filler("red bar", image=given.images[:, :, :8, :8], mask=given.masks[:, :, :8, :8])
    with pytest.raises(DiffratioError, match=r"image of shape \(1, 1, 16, 16\) must be \(B, 3, H, W\)"):
        filler("red bar", image=given.masks, mask=given.masks)
    with pytest.raises(DiffratioError, match="2 images for 3 samples"):
        filler(["a"] * 3, image=known(2).images, mask=given.masks)
    with pytest.raises(DiffratioError, match="fills holes in pictures: give known"):
        generate(filler, 1, labels=["a"], steps=1, quiet=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inpaint=none", "backbone.source=FILLING"], "is an inpainting model: .*set inpaint=default"),
        (["lora=default", "backbone.source=PLAIN"], "LoRA leaves as they are; set lora=none"),
        (["optimizer.weights=none", "method=mod", "backbone.source=PLAIN"], "optimizer.weights=none does not train"),
        (
            ["objective.distill=1", "method=mod", "backbone.source=PLAIN"],
            "set objective.distill=0, or take an inpainting",
        ),
        (["inpaint.mask=circles"], "mask 'circles' is no PNG"),
        (["inpaint.shares=[0.1,0.2]"], "shares"),
    ],
)
def test_jobs_that_do_not_fit_are_refused(
    here: Path, filling: Path, plain: Path, overrides: list[str], message: str
) -> None:
    given = [one.replace("FILLING", str(filling)).replace("PLAIN", str(plain)) for one in overrides]
    with pytest.raises(DiffratioError, match=message):
        train(compose("train", [*job(here, "refused", "method=dense"), *given]))
    assert not (here / "refused").exists()


def test_mixed_precision_trains_and_fills(here: Path, filling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
    check_mixed(lambda run: job(here, run, "method=diffcr", f"backbone.source={filling}"), here)
