"""class_accuracy and the probe that ships with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffratio.data.images import ImageData
from diffratio.data.registry import embedded_folder
from diffratio.errors import DiffratioError
from diffratio.evaluation.features import Lite0Features
from diffratio.evaluation.metrics import (
    Evidence,
    Probe,
    check_metrics,
    class_accuracy,
    find_probe,
    load_probe,
    measure,
    train_probe,
)
from diffratio.evaluation.metrics.probe import FOLDER, save_probe

LITE0 = "lite0-57934424@96"


def probe(classes: int = 3, width: int = 4, **changes: object) -> Probe:
    made = Probe(torch.eye(classes, width), torch.zeros(classes), "mean", "toy", 10, 5, 0.75, "by hand")
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def points(labels: list[int], width: int = 4) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), width).double()


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor, Tensor]:
    pytest.importorskip("efficientnet_lite_pytorch")
    images, labels = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10).held_out(100)
    return images, Lite0Features().extract(images), labels


def test_the_shipped_probe_says_how_it_was_made_and_reads_real_images(held_out: tuple[Tensor, Tensor, Tensor]) -> None:
    _, features, labels = held_out
    shipped = find_probe("fashion_mnist", LITE0)
    assert shipped.classes == 10 and shipped.n >= 6000 and shipped.n_held_out == 5000
    assert shipped.made_by.startswith("python -m diffratio.evaluation.metrics.train_probe --data fashion_mnist")
    result = class_accuracy(features, labels, shipped, extractor=LITE0)
    assert result.low <= shipped.accuracy <= result.high  # the header's figure is what it does on held-out images
    assert result.value > 0.75 and result.real == shipped.accuracy and result.chance == 0.1
    turned = class_accuracy(features, (labels + 1) % 10, shipped)
    assert turned.value < 0.15


def test_shipped_probes_are_small() -> None:
    assert sorted(path.stat().st_size for path in FOLDER.glob("*.safetensors"))[-1] <= 60_000


def test_accuracy_is_the_share_with_a_wilson_interval() -> None:
    result = class_accuracy(points([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]), probe())
    assert result.value == 0.75 and result.n == 4 and result.chance == pytest.approx(1 / 3)
    assert (result.low, result.high) == pytest.approx((0.30064, 0.95441), abs=1e-4)  # Wilson, 3 of 4
    perfect = class_accuracy(points([0, 1, 2, 2]), torch.tensor([0, 1, 2, 2]), probe())
    assert perfect.high == pytest.approx(1.0) and perfect.low < 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_accuracy(points([0, 1]), torch.tensor([0, 3]), probe()), "knows classes 0 to 2, got .* 0 to 3"),
        (lambda: class_accuracy(points([0, 1]), torch.tensor([0]), probe()), "a label for each of 2 samples"),
        (lambda: class_accuracy(points([0, 1], 5), torch.tensor([0, 1]), probe()), "features of width 4, got 5"),
        (lambda: class_accuracy(points([0, 1]), torch.tensor([0, 1]), probe(), extractor="x"), "reads 'mean' .* 'x'"),
        (lambda: find_probe("fashion_mnist", "lite0-57934424@64"), f"there is: fashion_mnist on {LITE0}"),
        (lambda: find_probe("emoji", LITE0), "no probe for data set 'emoji'"),
        (lambda: load_probe("nowhere.safetensors"), "cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffratioError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_comparison_measures_it_where_a_probe_fits_and_leaves_it_out_elsewhere(
    held_out: tuple[Tensor, Tensor, Tensor],
) -> None:
    images, features, labels = held_out
    fits = Evidence(images, features, features, labels=labels, data="fashion_mnist", extractor=LITE0)
    found = measure(["class_accuracy"], fits)["class_accuracy"]
    assert found["value"] > 0.75 and found["n"] == 100
    assert all(isinstance(value, int | float) for value in found.values())  # as records take it
    for change in ({"data": "emoji"}, {"extractor": "lite0-57934424@64"}, {"labels": labels + 5}, {"labels": None}):
        assert measure(["class_accuracy"], dataclasses.replace(fits, **change)) == {}  # type: ignore[arg-type]
    assert check_metrics(["class_accuracy"])


def test_a_probe_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    save_probe(probe(), path)
    back = load_probe(path)
    assert torch.equal(back.weight, probe().weight)
    assert dataclasses.replace(back, weight=probe().weight, bias=probe().bias).made_by == "by hand"
    assert (back.n, back.n_held_out, back.accuracy, back.data) == (10, 5, 0.75, "toy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DiffratioError, match="cannot be read"):
        load_probe(path)


def test_a_probe_of_another_format_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = str(tmp_path / "probe.safetensors")
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, path, metadata={"format": "diffratio-probe-1"})
    with pytest.raises(DiffratioError, match="without extractor, data, n, n_held_out, accuracy, made_by"):
        load_probe(path)


class Corners:
    """Features that tell the toy classes apart."""

    id, resize = "corners", 2

    def extract(self, images: Tensor, batch_size: int = 64) -> Tensor:
        return images.flatten(1)


def test_training_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path))
    labels = torch.arange(120) % 3
    centres = torch.eye(3, 4).view(3, 1, 2, 2) / 2
    noise = torch.randn(120, 1, 2, 2, generator=torch.Generator().manual_seed(0)) / 8
    images = (centres[labels] + noise).clamp(-1, 1)
    # the labels of the last 10 held-out images are wrong: the stated accuracy must be measured, not assumed
    wrong = torch.cat([labels[60:110], (labels[110:] + 1) % 3])
    made = train_probe.train_probe((images[:60], labels[:60]), (images[60:], wrong), Corners(), "toy", "test")
    assert made.classes == 3 and made.n == 60 and made.n_held_out == 60
    assert made.accuracy == pytest.approx(5 / 6, abs=0.05)
    assert class_accuracy(images[60:].flatten(1), labels[60:], made).value > 0.95
    assert torch.equal(made.weight, made.weight.half().float())


def test_fit_minimises_what_it_says() -> None:
    """At the optimum the gradient of the penalised loss is zero, in the standardised features."""
    x, y = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 2, (50,))
    weight, bias = train_probe.fit(x, y, 2, 0.1)
    mean, scale = x.mean(0), x.std(0)
    w, b = (weight * scale).requires_grad_(True), (bias + weight @ mean).requires_grad_(True)
    loss = torch.nn.functional.cross_entropy((x - mean) / scale @ w.T + b, y) + 0.05 * w.square().sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert float(gradient.abs().max()) < 1e-5


def test_the_images_that_it_reads_are_those_of_the_data_module() -> None:
    images, labels = train_probe.read_images(embedded_folder("fashion_mnist") / "test.parquet", 3, 32)
    data, classes = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10).held_out(5000)
    for image, label in zip(images, labels, strict=True):
        (same,) = (data == image).all(dim=(1, 2, 3)).nonzero()
        assert classes[same[0]] == label


def test_bad_files_end_the_command_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        train_probe.main(["--train", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "x.safetensors")])
    assert raised.value.code == 2
    assert "no file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
