"""Features of reference images, kept on disk with where they come from, so that a comparison extracts them once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.files import atomic_file, cache_folder

if TYPE_CHECKING:
    from diffratio.evaluation.features import FeatureExtractor

_FORMAT = "diffratio-features-2"


def cached_features(images: Tensor, extractor: FeatureExtractor, data: str) -> Tensor:
    """`reference_features` with a file of its own in `cache_folder`, named by data set, extractor and images.

    Args:
        images: reference images in [-1, 1], (n, C, H, W).
        extractor: what extracts the features.
        data: name of the data set, for the file's name and metadata.

    Returns:
        Features (n, d).

    Raises:
        DiffratioError: the file is not what its name says, cannot be read, or the folder cannot be written.
    """
    name = "".join(c if c.isalnum() or c in "-_.@" else "_" for c in f"{data}-{extractor.id}-n{len(images)}")
    path = cache_folder() / "features" / f"{name}-{content_hash(images)[:12]}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffratioError(
            f"cache folder {str(path.parent)!r} cannot be made ({error.strerror}); set DIFFRATIO_CACHE to another one"
        ) from None
    return reference_features(images, extractor, path, data=data)


def reference_features(
    images: Tensor, extractor: FeatureExtractor, cache: str | Path | None = None, *, data: str | None = None
) -> Tensor:
    """Features of reference images, read from a cache file where there is one and written to it otherwise.

    Args:
        images: reference images in [-1, 1], (n, C, H, W).
        extractor: what extracts the features.
        cache: safetensors file; its metadata holds the extractor's id and resize, n, the name of the data set and a
            sha256 of the images. A file that says otherwise is never overwritten.
        data: name of the data set that the images come from.

    Returns:
        Features (n, d).

    Raises:
        DiffratioError: the cache is of another extractor or of other images, or cannot be read.
    """
    if cache is None:
        return extractor.extract(images)
    path = Path(cache)
    expected = {
        "format": _FORMAT,
        "extractor": extractor.id,
        "resize": str(getattr(extractor, "resize", "none")),
        "n": str(len(images)),
        "data": data or "unnamed",
        "images": content_hash(images),
    }
    if path.exists():
        return _read(path, expected)
    from safetensors.torch import save_file

    features = extractor.extract(images).contiguous()
    with atomic_file(path) as temporary:
        save_file({"features": features}, str(temporary), metadata=expected)
    return features


def content_hash(images: Tensor) -> str:
    """sha256 of a tensor's shape and its values as float32."""
    content = images.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(repr(tuple(content.shape)).encode())
    digest.update(content.numpy().data)
    return digest.hexdigest()


def _read(path: Path, expected: dict[str, str]) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            found = file.metadata() or {}
            features: Tensor = file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise DiffratioError(
            f"cached features {str(path)!r} cannot be read ({error}); delete the file, it is made anew"
        ) from None
    for key, value in expected.items():
        if found.get(key) != value:
            raise DiffratioError(
                f"cached features {str(path)!r} have {key} {found.get(key)!r}, this run needs {value!r}; "
                "delete the file or name another cache"
            )
    if features.ndim != 2 or str(len(features)) != expected["n"]:
        raise DiffratioError(
            f"cached features {str(path)!r} have shape {tuple(features.shape)}, this run needs n {expected['n']!r}; "
            "delete the file"
        )
    return features
