"""A text-to-image model trained on three aspect ratios: its losses by hand, and resumed inside an epoch."""

from __future__ import annotations

import copy
import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image as Pictures
from PIL import ImageOps
from torch import Tensor

from diffratio.data.precompute import precompute
from diffratio.errors import DiffratioError
from diffratio.methods.routed import RoutedMethod
from diffratio.objectives import sample_draws
from diffratio.surgery import attachment
from diffratio.tokens.grid import TokenGrid
from diffratio.training.build import build_data, build_module, build_transformer
from diffratio.training.run import compose, plain_config, train
from diffratio.training.step import TrainingStep, spread_ratios_
from tests.captioned import MODEL, captioned_parquet, tiny_encoder
from tests.tiny_run import MODEL as FASHION
from tests.tiny_run import TINY
from tests.training.resuming import assert_same_end

BUCKETS = "data.buckets=[[8,32],[16,16],[24,12]]"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures of three shapes."""
    folder = tmp_path_factory.mktemp("buckets")
    tiny_encoder(folder / "tiny-bert")
    captioned_parquet(folder / "data", n=30)
    path = folder / "data" / "train.parquet"
    table = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache"))

    def reshaped(row: dict[str, Any], number: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        row["image"].resize(((60, 15), (20, 20), (13, 27))[number % 3]).save(buffer, "PNG")
        return {"image": {"bytes": buffer.getvalue(), "path": None}}

    rows = [{**row, **reshaped(row, number)} for number, row in enumerate(table)]
    Dataset.from_list(rows, features=table.features).to_parquet(path)
    return folder


@pytest.fixture(autouse=True)
def _cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(here / "cache"))


def job(here: Path, run: str, *overrides: str) -> list[str]:
    own = [one for one in TINY if one not in FASHION and not one.startswith(("data.batch_size", "trainer.max_steps"))]
    places = [f"data.source={here / 'data'}", f"data.text.encoder={here / 'tiny-bert'}"]
    few = ["data.batch_size=4", "trainer.max_steps=4", "callbacks.pictures_n=1", BUCKETS]
    return [*MODEL, *own, *places, f"paths.output_dir={here / run}", *few, *overrides]


def config(here: Path, *overrides: str) -> dict[str, Any]:
    return plain_config(compose("train", job(here, "unused", *overrides)))


def by_hand(module: Any, data: Any, batch: dict[str, Tensor], cfg: dict[str, Any]) -> float:
    """Flow-matching loss of a batch, a picture at a time, from the source's bytes."""
    transformer, losses = copy.deepcopy(module.transformer), []
    table = load_dataset("parquet", data_files=f"{data.source}/train.parquet", split="train")
    height, width = batch["images"].shape[-2:]
    positions = batch["positions"].tolist()
    uniform, noise = sample_draws(cfg["seed"], positions, (3, height, width))
    levels = module.objective.quantile(uniform.double().clamp(1e-6, 1 - 1e-6)).float()
    for place, row in enumerate(data.train_rows(positions)):
        picture = ImageOps.fit(table[row]["image"].convert("RGB"), (width, height), Pictures.Resampling.LANCZOS)
        clean = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        u = levels[place]
        text = data.conditions.arguments(batch["labels"][place : place + 1])
        with torch.no_grad():
            output = transformer(
                ((1 - u) * clean + u * noise[place])[None], timestep=1000 * u[None], **text, return_dict=False
            )[0]
        losses.append(float((output - (noise[place] - clean)).square().mean()))
    return sum(losses) / len(losses)


def test_the_loss_of_every_batch_is_that_of_its_pictures_by_hand(here: Path) -> None:
    cfg = config(here, "method=diffcr", "budget.target=0.7", "objective=flow", "objective.timesteps=iid")
    data = build_data(cfg)
    module = spread_ratios_(build_module(cfg, data), 0.7, 0.2)
    method = attachment(module.transformer).token_method
    assert isinstance(method, RoutedMethod)
    assert module.run.grid == TokenGrid(4, 4)  # the budget counts the model's own size
    step, grids = TrainingStep(module, "cpu", 0.7, "32-true"), []
    for batch in islice(data.train_dataloader(), 4):
        expected = by_hand(module, data, batch, cfg)
        assert step(batch) == pytest.approx(expected, rel=1e-5)
        height, width = batch["images"].shape[-2:]
        context = attachment(module.transformer).context
        assert context is not None and context.grid == TokenGrid(height // 4, width // 4)
        grids.append(context.grid)
    assert len(set(grids)) == 3
    assert module.projection.fraction(module.keep_ratios) == pytest.approx(0.7, abs=1e-4)


def test_two_steps_and_two_more_are_four(here: Path) -> None:
    """The cut is inside the first epoch."""
    train(compose("train", job(here, "parts", "method=mod", "trainer.max_steps=2")))
    train(compose("train", job(here, "parts", "method=mod", "ckpt_path=last")))
    train(compose("train", job(here, "whole", "method=mod")))
    assert_same_end(here / "parts", here / "whole")


def test_buckets_that_do_not_fit_are_one_line(here: Path) -> None:
    cfg = config(here)
    for buckets, message in (
        ([[16, 16], [8, 30]], r"data.buckets=\[8, 30\]: a 8x30 sample does not fit this pixart: .* whole 4x4 patches"),
        ([], "data.buckets is empty"),
        ([[16, 16], [16, 16]], "twice"),
        (511, "unknown data.buckets preset '511'"),
    ):
        cfg["data"]["buckets"] = buckets
        with pytest.raises(DiffratioError, match=message) as caught:
            build_transformer(cfg, build_data(cfg), weights=False)
        assert "\n" not in str(caught.value)


def test_a_dit_takes_squares_of_several_sizes_and_says_so(here: Path) -> None:
    words = [*FASHION, "data.source=fashion_mnist"]
    cfg = plain_config(compose("train", [*words, "data.buckets=[[16,16],[32,32]]", "data.batch_size=2"]))
    data = build_data(cfg)
    assert build_transformer(cfg, data, weights=False) is not None
    cfg["data"]["buckets"] = [[16, 32]]
    with pytest.raises(DiffratioError, match=r"data.buckets=\[16, 32\]: .*this DiT: it takes square samples"):
        build_transformer(cfg, build_data(cfg), weights=False)


def test_latents_are_precomputed_in_one_size(here: Path) -> None:
    cfg = {"data": {"buckets": 512, "source": str(here / "data")}}
    fields = {"out": str(here / "latents"), "vae": str(here / "vae"), "text": None, "tokens": None}
    rest = {"dtype": "float16", "shard_size": 8, "batch_size": 2, "workers": 1, "streaming": False, "device": "cpu"}
    with pytest.raises(DiffratioError, match="data.buckets=512: latents are precomputed in one size"):
        precompute({**cfg, **fields, **rest})
