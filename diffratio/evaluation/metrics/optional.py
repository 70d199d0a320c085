"""Figures that need packages or weights from outside: Inception (FID, IS, precision, recall), CLIP and LPIPS.

Each heavy package is imported by the one function that uses it. The figures themselves are `distances.fd` and the pure
functions of `sets`; here stands what turns images into their features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.errors import DiffratioError
from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.memo import remembered
from diffratio.evaluation.metrics.base import Metric
from diffratio.evaluation.metrics.distances import FD, FD_MINIMUM, fd
from diffratio.evaluation.metrics.images import image_pair
from diffratio.evaluation.metrics.sets import (
    NEIGHBOURS,
    SetFigure,
    clip_score,
    cmmd,
    inception_score,
    precision_recall,
)
from diffratio.evaluation.statistics import Estimate, mean_estimate

CLIP_WEIGHTS = "openai/clip-vit-large-patch14-336"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32


def require_package(name: str, metric: Metric) -> None:
    """Checks, without importing it, that the package of an optional metric is installed.

    Raises:
        DiffratioError: it is missing; names the extra that brings it.
    """
    import sys

    package = metric.package
    if package is None or sys.modules.get(package) is not None:
        return
    if package in sys.modules or find_spec(package) is None:
        raise DiffratioError(
            f"{name} needs the package {package!r}; pip install 'diffratio[{metric.extra}]' -c constraints.txt "
            "(it brings torchvision: take one that fits your torch)"
        )


def inception(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of the Inception-v3 that published FID and IS figures use.

    Args:
        images: (n, 1 or 3, H, W) in [-1, 1].

    Returns:
        Pooled features (n, 2048) and logits without bias (n, 1008), on the CPU.

    Raises:
        DiffratioError: the package is missing, or its weights cannot be fetched.
    """

    def extract() -> tuple[Tensor, Tensor]:
        network = _inception_network()
        pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features, logits = _in_batches(network, pixels.expand(-1, 3, -1, -1))
        return features, logits

    return remembered("inception", (images,), extract)  # four figures share one pass


def clip_images(images: Tensor) -> Tensor:
    """CLIP embeddings of images.

    Args:
        images: (n, 1 or 3, H, W) in [-1, 1]; resized (bicubic) to the model's square.

    Returns:
        Embeddings (n, d), on the CPU.

    Raises:
        DiffratioError: the weights cannot be loaded.
    """

    def extract() -> Tensor:
        model, _, size = _clip(_clip_weights())
        x = images.detach().float().expand(-1, 3, -1, -1)
        if x.shape[-2:] != (size, size):
            x = nn.functional.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((x + 1) / 2 - torch.tensor(_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(_CLIP_STD).view(3, 1, 1)
        (found,) = _in_batches(lambda part: (_pooled(model.get_image_features(pixel_values=part)),), x)
        return found

    return remembered(("clip", _clip_weights()), (images,), extract)


def clip_texts(prompts: Sequence[str]) -> Tensor:
    """CLIP embeddings of prompts, (n, d), cut at the model's length.

    Raises:
        DiffratioError: the weights cannot be loaded.
    """
    model, tokenizer, _ = _clip(_clip_weights())
    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), _BATCH):
            tokens = tokenizer(
                list(prompts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            tokens = {key: value.to(_device()) for key, value in tokens.items()}
            found.append(_pooled(model.get_text_features(**tokens)).cpu())
    return torch.cat(found)


def lpips(a: Tensor, b: Tensor) -> Estimate:
    """Mean over samples of the learned perceptual distance (AlexNet, version 0.1).

    Args:
        a: images in [-1, 1], (n, 1 or 3, H, W).
        b: the same samples from the other model.

    Returns:
        Mean with its t interval over samples; 0 is equal, lower is closer.

    Raises:
        DiffratioError: different shapes, fewer than 2 samples, or the package is missing.

    Source:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018).
    """
    a, b = image_pair("lpips", a, b)
    network = _lpips_network()
    pairs = torch.stack([part.float().expand(-1, 3, -1, -1) for part in (a, b)], dim=1)  # (n, 2, 3, H, W)
    (each,) = _in_batches(lambda part: (network(part[:, 0], part[:, 1]).flatten(),), pairs)
    return mean_estimate(each, "lpips")


@lru_cache(maxsize=1)
def _inception_network() -> Any:
    require_package("fid", OPTIONAL_METRICS["fid"])
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    try:
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except OSError as error:  # urllib's errors are OSErrors
        raise DiffratioError(f"Inception weights cannot be fetched ({error}); connect to the network once") from None
    return network.to(_device()).eval()


@lru_cache(maxsize=1)
def _lpips_network() -> Any:
    require_package("lpips", OPTIONAL_METRICS["lpips"])
    try:
        return import_module("lpips").LPIPS(net="alex", verbose=False).to(_device()).eval()
    except OSError as error:
        raise DiffratioError(f"LPIPS weights cannot be fetched ({error}); connect to the network once") from None


@lru_cache(maxsize=1)
def _clip(weights: str) -> tuple[Any, Any, int]:
    """Model, tokenizer and side of its images; transformers' own image processor would need torchvision."""
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model: Any = CLIPModel.from_pretrained(weights)
        tokenizer = CLIPTokenizer.from_pretrained(weights)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DiffratioError(
            f"CLIP weights {weights!r} cannot be loaded ({reason}); connect to the network once, or set "
            "DIFFRATIO_CLIP to a folder that holds them"
        ) from None
    return model.to(_device()).eval(), tokenizer, int(model.config.vision_config.image_size)


def _clip_weights() -> str:
    return os.environ.get("DIFFRATIO_CLIP") or CLIP_WEIGHTS


def _pooled(output: Any) -> Tensor:
    # transformers 5 returns the projected embedding in a record, 4 returned it bare
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    device = _device()
    parts = [tuple(one.cpu() for one in function(part.to(device))) for part in x.split(_BATCH)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _real(name: str, e: Evidence) -> Tensor:
    if e.reference_images is None:
        raise DiffratioError(f"{name} needs the reference images themselves; give Evidence(reference_images=...)")
    return e.reference_images


def _fid(e: Evidence) -> FD:
    return fd(inception(_real("fid", e))[0], inception(e.images)[0])


def _precision_recall(name: str, e: Evidence) -> tuple[SetFigure, SetFigure]:
    return precision_recall(inception(_real(name, e))[0], inception(e.images)[0])


def _clip_score(e: Evidence) -> Estimate:
    if e.prompts is None:
        raise DiffratioError("clip_score needs the prompts of the samples; give Evidence(prompts=...)")
    return clip_score(clip_images(e.images), clip_texts(e.prompts))


_INCEPTION: dict[str, Any] = {"package": "torch_fidelity", "extra": "inception"}

OPTIONAL_METRICS: dict[str, Metric] = {
    "fid": Metric("Frechet distance, Inception-v3 features, at this n only", "lower", FD_MINIMUM, _fid, **_INCEPTION),
    "is": Metric(
        "Inception score over 10 splits", "higher", 10, lambda e: inception_score(inception(e.images)[1]), **_INCEPTION
    ),
    "precision": Metric(
        "share of samples among the reference (3 nearest neighbours, Inception-v3 features)",
        "higher",
        NEIGHBOURS + 1,
        lambda e: _precision_recall("precision", e)[0],
        **_INCEPTION,
    ),
    "recall": Metric(
        "share of the reference among the samples (3 nearest neighbours, Inception-v3 features)",
        "higher",
        NEIGHBOURS + 1,
        lambda e: _precision_recall("recall", e)[1],
        **_INCEPTION,
    ),
    "cmmd": Metric(
        "squared MMD to the reference x 1000, Gaussian kernel, CLIP ViT-L/14@336 embeddings",
        "lower",
        2,
        lambda e: cmmd(clip_images(_real("cmmd", e)), clip_images(e.images)),
    ),
    "clip_score": Metric("100 x cosine of image and prompt, CLIP ViT-L/14@336 embeddings", "higher", 2, _clip_score),
    "lpips": Metric(
        "learned perceptual distance to the dense model's images at the same noise",
        "lower",
        2,
        lambda e: lpips(e.images, e.dense.images) if e.dense else None,
        package="lpips",
        extra="lpips",
    ),
}
