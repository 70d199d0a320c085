"""Aspect-ratio buckets: batches of one size, in an order that is a function of (seed, position)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as pixart
from PIL import Image as Pictures
from torch import Tensor

from diffratio.data import ImageData, open_data
from diffratio.data.buckets import BucketOrder, equal_area, nearest, read_buckets
from diffratio.errors import DiffratioError
from diffratio.inpainting import InpaintSettings

BUCKETS = [[8, 16], [12, 12], [16, 8]]
SHAPES = ((10, 21), (20, 20), (31, 15), (12, 12), (9, 20))  # height and width; by row in turn
OF_SHAPE = (0, 1, 2, 1, 0)
N = 47


def encoded(row: int, height: int, width: int, turned: bool = False) -> bytes:
    """A picture whose red is its row, with a white left edge and a bright bottom half."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = row
    pixels[height // 2 :, :, 1] = 200
    pixels[:, : max(1, width // 8), 2] = 255
    picture, buffer = Pictures.fromarray(pixels), io.BytesIO()
    exif = Pictures.Exif()
    if turned:
        exif[0x0112] = 6
    picture.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixed")
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c", "d"])})
    for split, count in (("train", N), ("test", 6)):
        rows = [{"bytes": encoded(row, *SHAPES[row % 5]), "path": None} for row in range(count)]
        table = {"image": rows, "label": [row % 4 for row in range(count)]}
        Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def build(source: str, **changes: Any) -> ImageData:
    arguments: dict[str, Any] = {
        "image_size": 12, "channels": 3, "num_classes": 4, "batch_size": 4, "seed": 3, "buckets": BUCKETS,
    }  # fmt: skip
    return ImageData(source, **(arguments | changes))


def batches(data: ImageData, count: int) -> list[dict[str, Tensor]]:
    return list(islice(data.train_dataloader(), count))


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("side", "table"), [(256, "256"), (512, "512"), (1024, "1024")])
def test_a_preset_holds_every_size_that_diffusers_samples_pixart_at(side: int, table: str) -> None:
    found = read_buckets(side)
    assert found == read_buckets(str(side)) and found is not None
    known = {tuple(map(int, sizes)) for sizes in getattr(pixart, f"ASPECT_RATIO_{table}_BIN").values()}
    assert known <= set(found)
    assert {(width, height) for height, width in found} == set(found) and len(found) < 60
    assert all(0.9 * side**2 <= height * width <= side**2 for height, width in found)


def test_a_picture_goes_to_the_nearest_aspect_ratio_then_area() -> None:
    buckets = [*equal_area(64, 16), (32, 32)]
    sizes = np.random.default_rng(0).integers(5, 400, (300, 2))
    for (height, width), found in zip(sizes, nearest(sizes, buckets), strict=True):
        distance = [abs(np.log(height / width) - np.log(h / w)) for h, w in buckets]
        assert distance[found] == pytest.approx(min(distance))
    squares = np.array([[500, 500], [20, 20], [33, 33], [64, 64]])
    assert [buckets[one] for one in nearest(squares, buckets)] == [(64, 64), (32, 32), (32, 32), (64, 64)]


def test_every_batch_is_of_one_bucket_and_every_picture_covers_its_nearest(source: str) -> None:
    data = build(source, flip=False, label_dropout=0.0)
    seen = set()
    for batch in batches(data, 30):
        size = tuple(batch["images"].shape[-2:])
        seen.add(size)
        rows = data.train_rows(batch["positions"].tolist())
        assert {tuple(BUCKETS[OF_SHAPE[row % 5]]) for row in rows} == {size}
        assert batch["labels"].tolist() == [row % 4 for row in rows]
        pixels = (batch["images"] * 127.5 + 127.5).round()
        assert pixels[:, 0].flatten(1).unique(dim=1).flatten().tolist() == rows  # red: nothing was padded
        half = size[0] // 2
        assert (pixels[:, 1, : half - 2] < 20).all() and (pixels[:, 1, half + 2 :] > 180).all()  # the middle stays it
    assert seen == {tuple(one) for one in BUCKETS}


def test_a_picture_by_hand(source: str) -> None:
    """Row 0 is 10 x 21 and covers 8 x 16 at 10/8 of it, which leaves half a column on either side."""
    data = build(source, flip=False)
    batch = next(one for one in batches(data, 30) if 0 in data.train_rows(one["positions"].tolist()))
    place = data.train_rows(batch["positions"].tolist()).index(0)
    with Pictures.open(io.BytesIO(encoded(0, 10, 21))) as picture:
        expected = np.asarray(picture.resize((16, 8), Pictures.Resampling.LANCZOS, box=(0.5, 0, 20.5, 10)))
    found = (batch["images"][place] * 127.5 + 127.5).round().permute(1, 2, 0)
    assert torch.equal(found, torch.from_numpy(expected.copy()).float())


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_no_picture_is_lost_or_doubled_in_a_pass(batch_size: int) -> None:
    which = np.random.default_rng(1).integers(0, 3, N)
    order = BucketOrder(which, 4, batch_size, seed=5)  # the last bucket is empty
    counts = np.bincount(which, minlength=4)
    streams: list[list[int]] = [[], [], [], []]
    for number in range(6 * N // batch_size):
        bucket, rows = order.batch(number)
        assert (which[rows] == bucket).all() and len(rows) == batch_size
        streams[bucket] += rows.tolist()
        # the buckets keep step: after any number of batches each has had its share, but for the rest of one epoch
        done = (number + 1) * batch_size / N
        assert all(
            abs(len(one) - done * count) <= count + batch_size for one, count in zip(streams, counts, strict=True)
        )
    assert not streams[3]
    for bucket, stream in enumerate(streams[:3]):
        whole = [stream[i : i + counts[bucket]] for i in range(0, len(stream), int(counts[bucket]))]
        assert all(sorted(one) == np.flatnonzero(which == bucket).tolist() for one in whole[:-1])
        assert max(Counter(stream).values()) - min(Counter(stream).get(row, 0) for row in whole[0]) <= 1
        assert len(whole) < 3 or whole[0] != whole[1]


@pytest.mark.parametrize("position", [8, 44, 48, 400])
def test_resume_equals_uninterrupted_also_inside_an_epoch(source: str, position: int) -> None:
    whole = build(source)
    whole.set_position(position - 8)
    resumed = build(source)
    resumed.load_state_dict({"position": position})
    assert_same(batches(resumed, 6), batches(whole, 8)[2:])


def test_two_processes_and_loader_processes_give_the_single_stream(source: str) -> None:
    single = batches(build(source), 8)
    parts = []
    for rank in (0, 1):
        data = build(source)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        parts.append(batches(data, 4))
    assert_same([batch for pair in zip(*parts, strict=True) for batch in pair], single)
    assert_same(batches(build(source, num_workers=2), 4), single[:4])


def test_flips_label_drops_and_masks_are_those_of_the_position(source: str) -> None:
    plain, other = batches(build(source, flip=False, label_dropout=0.0), 20), batches(build(source), 20)
    mirrored = [
        torch.equal(a, b.flip(-1)) and not torch.equal(a, b)
        for one, two in zip(plain, other, strict=True)
        for a, b in zip(one["images"], two["images"], strict=True)
    ]
    assert 20 < sum(mirrored) < 60
    square = batches(build(source, buckets=None), 20)
    assert [batch["labels"] == 4 for batch in square] != []
    for one, two in zip(other, square, strict=True):
        assert torch.equal(one["labels"] == 4, two["labels"] == 4)  # drawn from (seed, position)
    holed = build(source, inpaint=InpaintSettings("mixed", (0.2, 0.4)))
    for batch in batches(holed, 6):
        masks = batch["masks"]
        assert masks.shape == (4, 1, *batch["images"].shape[-2:])
        assert (masks.mean((1, 2, 3)) >= 0.2).all() and (masks.mean((1, 2, 3)) <= 0.4).all()
        expected = holed.masks.training(batch["positions"].tolist(), masks.shape[-2:])  # type: ignore[union-attr]
        assert torch.equal(masks, expected)


def test_held_out_and_reference_pictures_stay_squares(source: str) -> None:
    data = build(source)
    assert data.held_out(6)[0].shape == data.reference(6)[0].shape == (6, 3, 12, 12)
    assert_same(list(data.val_dataloader()), list(build(source, buckets=None).val_dataloader()))


def test_a_picture_lying_on_its_side_counts_as_it_stands(tmp_path: Path) -> None:
    features = Features({"image": Image()})
    rows = [{"bytes": encoded(row, 8, 16, turned=row % 2 == 1), "path": None} for row in range(8)]
    Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "train.parquet")
    data = build(str(tmp_path), num_classes=None, batch_size=1, validation_fraction=0.2, buckets=[[8, 16], [16, 8]])
    for batch in batches(data, 12):
        (row,) = data.train_rows(batch["positions"].tolist())
        assert batch["images"].shape[-2:] == ((16, 8) if row % 2 else (8, 16))


def test_a_damaged_picture_is_named_before_training(parquet: Callable[..., Path]) -> None:
    folder = parquet("train", n=8, broken={3: b"no picture"})
    data = ImageData(str(folder), image_size=8, channels=1, num_classes=4, batch_size=2, buckets=[[8, 8]])
    with pytest.raises(DiffratioError, match="image in row 3 of split 'train' cannot be decoded"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([], "data.buckets is empty; give pairs"),
        ([[8, 16], [8, 16]], r"data.buckets holds \[8, 16\] twice; leave one of them out"),
        ([[8, 16], [8]], r"data.buckets holds \[8\], which is no \[height, width\]"),
        ([[8, 0]], "which is no"),
        ([[8.0, 16]], "which is no"),
        ([8, 16], "data.buckets holds 8, which is no"),
        ({"a": 1}, r"data.buckets is \{'a': 1\}; give pairs"),
        (True, "data.buckets is True; give pairs"),
        ("500", "unknown data.buckets preset '500'.*512"),
    ],
)
def test_bad_buckets_are_one_line(buckets: Any, message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        read_buckets(buckets)
    assert "\n" not in str(caught.value)


def test_what_does_not_go_with_buckets_says_so(source: str, tmp_path: Path) -> None:
    Pictures.fromarray(np.full((12, 12), 255, dtype=np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(DiffratioError, match=r"inpaint.mask=.*mask.png' is of one size and data.buckets has 3"):
        build(source, inpaint=InpaintSettings(str(tmp_path / "mask.png")))
    with pytest.raises(DiffratioError, match="data.buckets cuts pictures, and data.kind=precomputed holds latents"):
        open_data({"kind": "precomputed", "source": source, "buckets": BUCKETS})
    data = build(source)
    data.set_position(6)
    with pytest.raises(DiffratioError, match="stands at sample 6.*data.batch_size=4 to what the run was begun with"):
        next(iter(data.train_dataloader()))
