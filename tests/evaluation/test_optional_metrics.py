"""Figures behind optional packages: the pure functions on synthetic features, the way to them with stand-ins."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffratio.errors import DiffratioError
from diffratio.evaluation import memo
from diffratio.evaluation.metrics import (
    DEFAULT_METRICS,
    METRICS,
    OPTIONAL_METRICS,
    Evidence,
    check_metrics,
    clip_score,
    cmmd,
    fd,
    inception_score,
    measure,
    optional,
    precision_recall,
)


def normal(n: int, shift: float = 0.0, seed: int = 0, d: int = 8) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def images(n: int, seed: int = 0, channels: int = 1) -> Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Networks and results that a stand-in gave must not outlive it."""
    yield
    memo.forget()
    for loaded in (optional._inception_network, optional._lpips_network, optional._clip):
        loaded.cache_clear()


def test_precision_and_recall_match_a_loop() -> None:
    real, fake, k = normal(20, seed=1, d=2), normal(15, shift=0.7, seed=2, d=2), 3

    def share(points: Tensor, members: Tensor) -> float:
        inside = 0
        for point in points:
            for i, member in enumerate(members):
                others = sorted(float((member - one).norm()) for j, one in enumerate(members) if j != i)
                if float((point - member).norm()) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = precision_recall(real, fake, k)
    assert precision.value == pytest.approx(share(fake, real))
    assert recall.value == pytest.approx(share(real, fake))
    assert 0 < precision.value < 1 and 0 < recall.value < 1
    assert (precision.n, precision.n_real) == (15, 20)


def test_precision_and_recall_tell_a_collapse_from_noise() -> None:
    real = normal(200, seed=1)
    collapsed = precision_recall(real, 0.05 * normal(200, seed=2))
    spread = precision_recall(real, 4 * normal(200, seed=3))
    assert collapsed[0].value > 0.95 and collapsed[1].value < 0.2
    assert spread[0].value < 0.2 and spread[1].value > 0.9
    assert [one.value for one in precision_recall(real, real)] == [1, 1]


def test_cmmd_matches_a_loop_and_is_zero_between_equal_sets() -> None:
    real, fake = normal(6, seed=1, d=3), normal(5, shift=1.0, seed=2, d=3)
    x, y = (part / part.norm(dim=1, keepdim=True) for part in (real, fake))

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-float((p - q).square().sum()) / 200) for p in a for q in b) / (len(a) * len(b))

    result = cmmd(real, fake)
    assert result.value == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6)
    assert cmmd(real, 7 * real).value == pytest.approx(0, abs=1e-9)  # lengths do not count
    shifted = [cmmd(normal(100, seed=1), normal(100, shift=s, seed=2)).value for s in (0, 0.3, 0.6, 1.2)]
    assert shifted == sorted(shifted)


def test_inception_score_of_known_distributions_and_of_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    sure = 100 * torch.eye(4, dtype=torch.float64).repeat(5, 1)
    assert inception_score(sure, splits=1).value == pytest.approx(4.0)
    assert inception_score(torch.zeros(20, 4), splits=10).value == pytest.approx(1.0)
    logits = normal(50, seed=3)
    theirs = InceptionScore(feature=nn.Identity(), splits=1)
    theirs.update(logits)
    assert inception_score(logits, splits=1).value == pytest.approx(float(theirs.compute()[0]), rel=1e-6)
    parts = inception_score(normal(500, seed=4), splits=10)
    assert parts.low < parts.value < parts.high and parts.n == 500


def test_clip_score_is_the_mean_cosine_without_negatives() -> None:
    pictures = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    texts = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert clip_score(pictures, texts).value == pytest.approx(100 * (1 + math.sqrt(0.5) + 0) / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(normal(9), normal(3)), "at least 4 samples in 'fake', got 3"),
        (lambda: precision_recall(normal(9), normal(9), 0), "at least 1 neighbour"),
        (lambda: inception_score(normal(9)), "at least 10 samples"),
        (lambda: inception_score(normal(9), 0), "at least 1 split"),
        (lambda: cmmd(normal(9), normal(9, d=3)), "equal d"),
        (lambda: clip_score(normal(9), normal(8)), "one to one, got 9 and 8"),
    ],
)
def test_bad_features_are_one_clear_line(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffratioError, match=message):
        call()


def test_none_of_them_is_measured_by_default() -> None:
    assert tuple(METRICS) == DEFAULT_METRICS
    assert not set(DEFAULT_METRICS) & set(OPTIONAL_METRICS)
    assert all(METRICS[name].extra is None for name in DEFAULT_METRICS)
    assert {"fid", "is", "precision", "recall", "clip_score", "cmmd", "lpips"} == set(OPTIONAL_METRICS)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("fid", "torch_fidelity", "inception"), ("recall", "torch_fidelity", "inception"), ("lpips", "lpips", "lpips")],
)
def test_a_missing_package_is_known_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DiffratioError, match=rf"{name} needs the package '{package}'; pip install 'diffratio\[{extra}"):
        check_metrics(["psnr", name])
    with pytest.raises(DiffratioError, match=extra):
        measure([name], Evidence(images(12), normal(12), normal(12)))


def test_the_extras_exist() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for metric in OPTIONAL_METRICS.values():
        assert metric.extra is None or any(
            line.split("==")[0].replace("-", "_") == metric.package for line in extras[metric.extra]
        )


class FakeInception(nn.Module):
    """As torch-fidelity's extractor is called: uint8 RGB in, the asked features out."""

    passes = 0

    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        assert name == "inception-v3-compat" and features == ["2048", "logits_unbiased"]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        FakeInception.passes += len(x)
        flat = x.float().mean(dim=1).flatten(1)
        return flat[:, :6], flat[:, 6:16] / 64


def test_inception_figures_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("torch_fidelity")
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    FakeInception.passes = 0
    real, fake = images(50, 1), images(40, 2)
    evidence = Evidence(fake, normal(40), normal(50), reference_images=real)
    found = measure(["fid", "is", "precision", "recall"], evidence)
    assert FakeInception.passes == 90
    flat = [((part + 1) * 127.5).round().flatten(1)[:, :6] for part in (real, fake)]
    assert found["fid"]["value"] == pytest.approx(fd(*flat).value)
    assert found["fid"]["n"] == 40 and found["recall"]["n_real"] == 50
    assert found["is"]["value"] > 1
    with pytest.raises(DiffratioError, match="fid needs the reference images"):
        measure(["fid"], Evidence(fake, normal(40), normal(50)))


def test_lpips_is_paired_with_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeDistance(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex" and not verbose

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape[1:] == b.shape[1:] == (3, 8, 8)
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    module = types.ModuleType("lpips")
    module.LPIPS = FakeDistance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    dense = Evidence(images(40, 1), normal(40), normal(40))
    arm = Evidence(images(40, 2), normal(40), normal(40), dense=dense)
    found = measure(["lpips"], arm)["lpips"]
    assert found["value"] == pytest.approx(float((arm.images - dense.images).abs().mean()), rel=1e-5)
    assert measure(["lpips"], dense) == {}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP of random weights, with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = len(words) - 1
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": end - 1, "eos_token_id": end}
    vision = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)).save_pretrained(
        folder
    )
    return folder


def test_clip_figures_on_a_tiny_clip(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CLIP", str(clip_folder))
    prompts = tuple("red shoe" if i % 2 else "bag" for i in range(40))
    fake, real = images(40, 1), images(40, 2)
    found = measure(
        ["cmmd", "clip_score"], Evidence(fake, normal(40), normal(40), reference_images=real, prompts=prompts)
    )
    pictures, texts = optional.clip_images(fake), optional.clip_texts(prompts)
    assert pictures.shape == texts.shape == (40, 8)
    torch.testing.assert_close(texts[0], texts[2])  # a prompt's padding and neighbours do not count
    torch.testing.assert_close(optional.clip_texts(["bag"])[0], texts[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(texts[0], texts[1])
    assert found["clip_score"]["value"] == pytest.approx(clip_score(pictures, texts).value)
    assert found["cmmd"]["value"] == pytest.approx(cmmd(optional.clip_images(real), pictures).value)
    with pytest.raises(DiffratioError, match="clip_score needs the prompts"):
        measure(["clip_score"], Evidence(fake, normal(40), normal(40)))


def test_missing_clip_weights_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CLIP", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DiffratioError, match="set DIFFRATIO_CLIP to a folder") as raised:
        optional.clip_images(images(2))
    assert "\n" not in str(raised.value)
