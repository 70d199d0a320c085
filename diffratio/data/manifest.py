"""The manifest of a precomputed set: which encoders made it, how it is scaled, and what lies in which file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.conditions import EncoderId
from diffratio.errors import DiffratioError, shortened
from diffratio.files import read_json, sha256, write_json
from diffratio.sampling.vae import VaeId

MANIFEST = "manifest.json"
FORMAT, VERSION = "diffratio-latents", 1
DTYPES = ("float16", "float32")
PREPARATIONS = ("none", "lower")
_MOST = 1 << 32  # of any count; sizes of files are compared with the files
_LARGEST_SIDE = 1 << 16  # pixels
_FIXED = {"statistic": "mean", "scaled": "when read: (mean - shift) * scale"}


@dataclass(frozen=True)
class LatentShard:
    """One file.

    Args:
        file: its name.
        samples: latents in it.
        captions: captions in it, each once.
        bytes: its size.
        sha256: of the file.
    """

    file: str
    samples: int
    captions: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or Path(self.file).name != self.file:  # a manifest names no files elsewhere
            raise DiffratioError(f"file {shortened(self.file)} must be a name")
        if not isinstance(self.sha256, str):
            raise DiffratioError(f"sha256 of {self.file!r} must be text, got {shortened(self.sha256)}")
        for key in ("samples", "captions", "bytes"):
            value = getattr(self, key)
            if type(value) is not int or not 0 <= value <= (_MOST if key != "bytes" else _MOST << 16):
                raise DiffratioError(f"{key} of {self.file!r} must be a count, got {shortened(value)}")


@dataclass(frozen=True)
class Manifest:
    """What a folder of latents holds.

    Latents are the means of the VAE's posterior, neither scaled nor shifted: the folder then does not depend on how a
    transformer wants them, a batch is a function of its positions alone, and the file is half the size of one with
    the deviations too.

    Args:
        name: of the data set.
        source: where its pictures came from.
        image_size: side of the pictures in pixels.
        dtype: of the stored latents.
        vae: what made them.
        text: what made the captions' states, an encoder or a set of them; None without captions.
        prepared: what was done to a caption before: `lower` is lower case without spaces around, as PixArt's pipelines
            do it.
        classes: of the model; None without classes.
        class_names: in the order of the labels.
        splits: name -> files.
        null: file of the empty caption.
    """

    name: str
    source: str
    image_size: int
    dtype: str
    vae: VaeId
    text: EncoderId | None
    prepared: str
    classes: int | None
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[LatentShard, ...]]
    null: LatentShard | None = None

    def __post_init__(self) -> None:
        for key in ("name", "source", "dtype", "prepared"):
            if not isinstance(getattr(self, key), str):
                raise DiffratioError(f"{key} must be text, got {shortened(getattr(self, key))}")
        if self.classes is not None and (type(self.classes) is not int or not 1 <= self.classes <= _MOST):
            raise DiffratioError(f"classes must be an integer of 1 to {_MOST} or null, got {shortened(self.classes)}")
        if not all(isinstance(name, str) for name in self.class_names):
            raise DiffratioError("class_names must be a list of names")
        if self.dtype not in DTYPES or self.prepared not in PREPARATIONS:
            raise DiffratioError(f"dtype {self.dtype!r} or prepared {self.prepared!r} is unknown")
        size, factor = self.image_size, self.vae.factor
        if type(size) is not int or not 1 <= size <= _LARGEST_SIDE or size % factor:
            raise DiffratioError(f"image_size {size!r:.40} is no multiple of the VAE's {factor} up to {_LARGEST_SIDE}")
        if not self.splits or (self.text is None) != (self.null is None):
            raise DiffratioError("splits or the empty caption are missing")

    @property
    def latent_size(self) -> int:
        """Side of a latent."""
        return self.image_size // self.vae.factor

    def samples(self, split: str) -> int:
        """Latents in a split."""
        return sum(shard.samples for shard in self.splits[split])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        values = dataclasses.asdict(self) | {"class_names": list(self.class_names)}
        if self.text is not None:
            values["text"] = self.text.to_json()
        return {"format": FORMAT, "version": VERSION, **_FIXED, **values}


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes it; a folder with it is finished."""
    write_json(folder / MANIFEST, manifest.to_json())


def read_manifest(folder: str | Path, verify: bool = False) -> Manifest:
    """Reads a manifest and checks that its files are there in full.

    Args:
        folder: what `diffratio precompute` wrote.
        verify: whether every file's sha256 is computed, which reads all of them; sizes are always compared.

    Raises:
        DiffratioError: no such folder, an unfinished one, or a file that is missing, cut short or changed.
    """
    path = Path(folder).expanduser()
    if not (path / MANIFEST).is_file():
        hint = (
            "the same `diffratio precompute` goes on with it" if (path / "job.json").is_file() else "make one with it"
        )
        raise DiffratioError(f"{str(path)!r} is no finished folder of `diffratio precompute` (no {MANIFEST}); {hint}")
    document = read_json(path / MANIFEST, "manifest of latents")
    try:
        manifest = _manifest(document)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DiffratioError(f"{str(path / MANIFEST)!r}: {reason}; precompute it anew") from None
    shards = [shard for split in manifest.splits.values() for shard in split]
    for shard in shards if manifest.null is None else [*shards, manifest.null]:
        file = path / shard.file
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != shard.bytes:
            found = "missing" if size is None else f"of {size} bytes"
            raise DiffratioError(f"{str(file)!r} is {found}, and the manifest says {shard.bytes}; copy it again")
        if verify and sha256(file) != shard.sha256:
            raise DiffratioError(f"{str(file)!r} is damaged: it does not have the sha256 of the manifest")
    return manifest


def _manifest(document: Any) -> Manifest:
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is no {FORMAT!r} of version {VERSION}, the one this release reads")
    values = {key: value for key, value in document.items() if key not in ("format", "version")}
    for key, value in _FIXED.items():
        if values.pop(key) != value:
            raise ValueError(f"{key} must be {value!r}")
    vae, text, null = values.pop("vae"), values.pop("text"), values.pop("null")
    return Manifest(
        **{key: values.pop(key) for key in ("name", "source", "image_size", "dtype", "prepared", "classes")},
        vae=VaeId(**vae),
        text=None if text is None else EncoderId(**text),
        class_names=tuple(values.pop("class_names")),
        splits={name: tuple(_shard(one) for one in shards) for name, shards in values.pop("splits").items()},
        null=None if null is None else _shard(null),
    )


def _shard(values: Mapping[str, Any]) -> LatentShard:
    return LatentShard(**values)
