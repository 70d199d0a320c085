"""Masks: of the share that was asked for, and a function of (seed, number) alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffratio.data.images import ImageData
from diffratio.errors import DiffratioError
from diffratio.inpainting import SHAPES, InpaintSettings, Known, Masks, hole
from tests.captioned import captioned_parquet


def png(path: Path, array: Any) -> str:
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)
    return str(path)


@given(
    st.sampled_from(SHAPES),
    st.integers(4, 40),
    st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_a_hole_has_the_share_that_was_asked_for(shape: str, size: int, share: tuple[float, float], seed: int) -> None:
    low, high = sorted(share)
    drawn = hole(shape, size, (low, high), np.random.default_rng(seed))
    pixel = 1 / size**2
    assert drawn.shape == (size, size) and low - 1e-9 <= drawn.mean() <= max(high, low + pixel) + 1e-9


def test_shares_fill_their_range_and_shapes_differ() -> None:
    masks = {shape: Masks(InpaintSettings(shape, (0.1, 0.5)), 32, 0).fixed(range(60)) for shape in SHAPES}
    for drawn in masks.values():
        shares = drawn.mean((1, 2, 3))
        assert 0.1 <= float(shares.min()) < 0.17 and 0.43 < float(shares.max()) <= 0.5
        assert len({one.numpy().tobytes() for one in drawn}) > 55

    def corners(drawn: torch.Tensor) -> float:
        """Share of edge pixels of a hole that have exactly one neighbour outside: straight edges have only those."""
        padded = torch.nn.functional.pad(1 - drawn, (1, 1, 1, 1))
        outside = padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
        edges = outside[drawn > 0.5]
        return float((edges[edges > 0] == 1).float().mean())

    assert corners(masks["boxes"]) > 0.85 > 0.75 > corners(masks["strokes"])


def test_a_mask_depends_on_seed_and_number_alone() -> None:
    masks = Masks(InpaintSettings("mixed", (0.2, 0.4), image_dropout=0.2), 16, seed=3)
    together = masks.training(range(40))
    assert torch.equal(together[17:20], masks.training([17, 18, 19]))
    assert not torch.equal(together, Masks(masks.settings, 16, seed=4).training(range(40)))
    assert not torch.equal(together[:8], masks.fixed(range(8)))
    whole = together.flatten(1).mean(1) == 1
    assert 2 <= int(whole.sum()) <= 16 and float(together[~whole].mean((1, 2, 3)).max()) <= 0.4


def test_data_gives_the_same_masks_however_it_is_read(tmp_path: Path) -> None:
    source = str(captioned_parquet(tmp_path))

    def read(size: int) -> ImageData:
        settings = InpaintSettings()
        split = "validation"
        return ImageData(
            source,
            image_size=16,
            channels=3,
            num_classes=None,
            validation_split=split,
            batch_size=size,
            inpaint=settings,
        )

    def batches(size: int) -> torch.Tensor:
        loader = iter(read(size).train_dataloader())
        return torch.cat([next(loader)["masks"] for _ in range(12 // size)])

    assert torch.equal(batches(4), batches(6))
    data = read(5)
    known, batch = data.held_out_known(5), next(iter(data.val_dataloader()))
    assert known is not None and torch.equal(batch["masks"][:5], known.masks)
    assert torch.equal(batch["images"][:5], known.images)


def test_files_are_taken_in_turn(tmp_path: Path) -> None:
    left, top = np.zeros((8, 8)), np.zeros((8, 8))
    left[:, :4], top[:2] = 255, 200
    png(tmp_path / "a.png", left), png(tmp_path / "b.png", top)
    masks = Masks(InpaintSettings(str(tmp_path)), 8, 0)
    found = masks.fixed(range(3))
    assert [float(one.mean()) for one in found] == [0.5, 0.25, 0.5]
    assert {float(one.mean()) for one in masks.training(range(20))} == {0.5, 0.25}


def test_known_pixels_are_shown_and_pasted_and_the_hole_is_hidden() -> None:
    images, masks = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    masks[:, :, :2] = 1
    known = Known(images, masks)
    assert known.channels.shape == (2, 4, 4, 4)
    assert torch.equal(known.channels[:, :3, 2:], images[:, :, 2:]) and not known.channels[:, :3, :2].any()
    assert torch.equal(known.channels[:, 3:], masks)
    pasted = known.pasted(torch.full_like(images, 9.0))
    assert torch.equal(pasted[:, :, 2:], images[:, :, 2:]) and bool((pasted[:, :, :2] == 9).all())
    assert torch.equal(known.take([3]).images[0], images[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": "circles"}, "none of boxes, strokes, mixed"),
        ({"mask": "EMPTY"}, "folder without PNGs"),
        ({"mask": "SMALL"}, "is 4x6 and the pictures are 8x8"),
        ({"mask": "BLACK"}, "has no hole"),
        ({"mask": "TEXT"}, "cannot be read"),
        ({"share": (0.5, 0.2)}, "inpaint.share"),
        ({"share": (0.0, 0.2)}, "inpaint.share"),
        ({"loss": "holes"}, "inpaint.loss"),
        ({"image_dropout": 1.5}, "inpaint.image_dropout"),
    ],
)
def test_masks_that_cannot_be_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    places = {
        "EMPTY": str(tmp_path / "empty"),
        "SMALL": png(tmp_path / "small.png", np.full((4, 6), 255)),
        "BLACK": png(tmp_path / "black.png", np.zeros((8, 8))),
        "TEXT": str(tmp_path / "text.png"),
    }
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(DiffratioError, match=message):
        Masks(InpaintSettings(**given), 8, 0)
