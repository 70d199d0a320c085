"""Text-to-image, from captions to a routed checkpoint, its samples and its comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffratio
from diffratio import cli
from diffratio.conditions import Captions
from diffratio.data.images import ImageData
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare import measuring, running
from diffratio.sampling.generate import generate
from diffratio.sampling.text import PixelTextPipeline
from diffratio.training.run import check, compose, export_run, train
from tests.captioned import MODEL, captioned_parquet, tiny_encoder
from tests.evaluation.comparing import PooledPixels, settings
from tests.tiny_run import MODEL as FASHION
from tests.tiny_run import TINY, check_mixed


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned")
    tiny_encoder(folder / "tiny-bert")
    captioned_parquet(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def _cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))


def job(here: Path, run: str, *overrides: str) -> list[str]:
    """Overrides of a tiny text-to-image job."""
    own = [one for one in TINY if one not in FASHION]
    places = [f"data.source={here / 'data'}", f"data.text.encoder={here / 'tiny-bert'}"]
    return [*MODEL, *own, *places, f"paths.output_dir={here / run}", *overrides]


@pytest.fixture(scope="module")
def base(here: Path) -> Path:
    """A dense text-to-image checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
        train(compose("train", job(here, "base", "method=dense", "callbacks.pictures_every=4")))
    return here / "base" / "export"


@pytest.fixture(scope="module")
def routed(here: Path, base: Path) -> Path:
    """The same fine-tuned with learned ratios."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
        own = job(here, "routed", "method=diffcr", f"backbone.source={base}", "budget.target=0.8")
        train(compose("train", own))
    return here / "routed" / "export"


def data_of(here: Path, **changes: Any) -> ImageData:
    text = {"encoder": str(here / "tiny-bert"), "tokens": 6}
    given: dict[str, Any] = {"image_size": 16, "channels": 3, "num_classes": None, "text": text}
    return ImageData(str(here / "data"), **(given | {"validation_split": "validation"} | changes))


def test_labels_are_captions_and_dropped_ones_the_empty_caption(here: Path) -> None:
    data = data_of(here, label_dropout=0.5, batch_size=64)
    batch = next(iter(data.train_dataloader()))
    captions = data.conditions
    assert isinstance(captions, Captions) and len(captions) == 9 and captions.null == 9
    dropped = batch["labels"] == captions.null
    assert 15 < int(dropped.sum()) < 50
    rows = data.train_rows(batch["positions"].tolist())
    for row, label in zip(rows, batch["labels"].tolist(), strict=True):
        colour, shape = ("red", "green", "blue")[row % 3], ("square", "bar", "dot")[row // 3 % 3]
        assert label == captions.null or captions.texts[label] == f"{colour} {shape}"


def test_held_out_captions_come_in_one_order(here: Path) -> None:
    first, again = data_of(here).held_out(8)[1], data_of(here).held_out(8)[1]
    assert torch.equal(first, again)


def test_a_dense_run_writes_pictures_and_a_checkpoint_that_names_its_encoder(here: Path, base: Path) -> None:
    assert len(list((here / "base" / "pictures").glob("samples-*.png"))) == 2
    card = json.loads((base / "card.json").read_text())
    assert card["text"]["name"] == str(here / "tiny-bert") and card["text"]["tokens"] == 6
    assert json.loads((base / "transformer" / "config.json").read_text())["_text_tokens"] == 6
    assert "diffratio" in (base / "README.md").read_text()


def test_a_routed_checkpoint_samples_prompts(here: Path, routed: Path) -> None:
    pipe = load(here, routed)
    prompts = ["red bar", "blue dot", "red bar"]
    pictures = generate(pipe, 3, labels=prompts, steps=3, quiet=True)
    assert pictures.shape == (3, 3, 16, 16) and not torch.equal(pictures[0], pictures[1])
    alone = generate(pipe, 1, labels=["blue dot"], steps=3, quiet=True, start=1)
    assert torch.allclose(alone[0], pictures[1], atol=1e-5)
    assert not torch.equal(pipe("red bar", 3.0, 3, latents=torch.ones(1, 3, 16, 16), output_type="pt").images,
                           pipe("red bar", 3.0, 3, latents=torch.ones(1, 3, 16, 16), output_type="pt",
                                negative_prompt="blue").images)  # fmt: skip
    run = diffratio.attach_(pipe).transformer
    assert diffratio.macs(run, steps=20).fraction < 0.81


def load(here: Path, folder: Path) -> Any:
    """The pipeline of a checkpoint."""
    pipe = diffratio.load_pipeline(folder)
    assert isinstance(pipe, PixelTextPipeline)
    return pipe


def test_the_pipeline_equals_a_loop_written_out(here: Path, base: Path) -> None:
    """Guidance: the empty prompt first, then the prompt."""
    pipe = load(here, base)
    noise = torch.randn(2, 3, 16, 16)
    found = pipe(["red bar", "blue dot"], 2.5, 4, latents=noise, output_type="pt").images * 2 - 1
    x, levels = noise.clone(), [1.0, 0.75, 0.5, 0.25, 0.0]
    prompts, none = pipe.encode(["red bar", "blue dot"]), pipe.encode([""] * 2)
    for level, following in zip(levels, levels[1:], strict=False):
        time = torch.full((2,), 1000 * level)
        with torch.no_grad():
            wanted, free = (pipe.transformer(x, timestep=time, **one, return_dict=False)[0] for one in (prompts, none))
        x = x + (following - level) * (free + 2.5 * (wanted - free))
    assert torch.allclose(found, x.clamp(-1, 1), atol=1e-4)


def test_the_command_line_samples_prompts(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "prompts.txt").write_text("red bar\n\nblue dot\n")
    out = here / "grid.png"
    assert (
        cli.main(
            ["sample", str(base), "--prompts", str(here / "prompts.txt"), "--steps", "2", "--out", str(out), "--json"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["n"] == 2 and out.is_file()
    assert cli.main(["sample", str(base), "--out", str(out)]) == 2
    assert "sampled by text: --prompts" in capsys.readouterr().err
    assert cli.main(["sample", str(base), "--prompts", "a", "--labels", "1"]) == 2
    assert cli.main(["sample", str(base), "--prompts", "missing.txt"]) == 2


def test_a_comparison_asks_for_held_out_captions(
    here: Path, base: Path, routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "Lite0Features", PooledPixels)
    monkeypatch.setattr(measuring, "mask_overlays", measuring.mask_overlays)
    data = data_of(here)
    changes = {"methods": ["tome", "importance"], "routed": [str(routed)], "weights": str(base), "train_n": 12}
    cfg = settings({"dense": str(base)}, tmp_path / "out", **changes)
    answer = running.compare_from_config(cfg, data.held_out, train=data.reference, conditions=data.conditions)
    rows = {row["arm"]: row for row in answer["arms"]}
    assert len(rows) == 4 and all(row["status"] == "ok" for row in rows.values()), rows
    assert all(abs(row["macs_fraction"] - 0.8) < 0.011 for name, row in rows.items() if name != "dense")
    assert rows["tome"]["excess_loss"] != 0
    record = json.loads(next((tmp_path / "out" / "records").glob("dense*.json")).read_text())
    captions = data.conditions
    assert isinstance(captions, Captions)
    assert record["images"]["labels"][0] == captions.texts[int(data.held_out(1)[1][0])]


def test_a_finished_run_exports_again(here: Path, routed: Path, tmp_path: Path) -> None:
    answer = export_run(str(here / "routed"), str(tmp_path / "again"), None)
    first, again = diffratio.load_transformer(routed), diffratio.load_transformer(tmp_path / "again")
    assert answer["macs_fraction"] < 0.81
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_check_needs_no_encoder(here: Path) -> None:
    found = check(compose("train", job(here, "unused", "method=diffcr", "data.text.encoder=nobody/nothing")))
    assert found["budget"]["reachable"][0] < 0.8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=fashion_mnist"], "conditioned on text, and data=fashion_mnist gives none"),
        (["data.caption_column=words"], "no column 'words'.*caption_column"),
        (["data.text.tokens=8", "backbone.source=BASE"], "set data.text.tokens=6"),
        (["backbone.config.caption_channels=8"], "12 channels a token, and the model takes 8"),
        (["data.num_classes=3"], "a model takes one of the two"),
        (
            ["data.text.encoder=OTHER", "backbone.source=BASE"],
            "here it is encoded by .*set data.text.encoder to that one",
        ),
    ],
)
def test_text_that_does_not_fit_is_refused(here: Path, base: Path, overrides: list[str], message: str) -> None:
    other = here / "other" / "tiny-bert"
    if any("OTHER" in one for one in overrides):
        tiny_encoder(other, seed=1)
    given = [one.replace("BASE", str(base)).replace("OTHER", str(other)) for one in overrides]
    if given == ["data=fashion_mnist"]:
        given = ["data=fashion_mnist", "data.image_size=16", "data.channels=3", "data.num_classes=null"]
        own = [one for one in job(here, "refused") if not one.startswith("data")]
    else:
        own = job(here, "refused")
    with pytest.raises(DiffratioError, match=message):
        train(compose("train", [*own, *given]))
    assert not (here / "refused").exists()


def test_mixed_precision_trains_and_samples(here: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))
    check_mixed(lambda run: job(here, run, "method=diffcr", f"backbone.source={base}", "objective.distill=1"), here)
