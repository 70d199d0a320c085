"""The data module of precomputed latents: batches from memory maps, pictures through the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.conditions.mapped import CaptionPart, MappedCaptions
from diffratio.conditions.pipelines import pipeline_text
from diffratio.data.images import ImageData
from diffratio.data.manifest import Manifest, read_manifest
from diffratio.data.split import ImageSplit
from diffratio.errors import DiffratioError
from diffratio.files import parse_json
from diffratio.sampling.vae import LatentCoder, identify, load_vae

KIND = "precomputed"  # what a config's `kind` says


class LatentFiles:
    """Latents of one split over its files, each a memory map that is opened when it is first read.

    Args:
        paths: the files in their order.
        counts: latents in each.
        shift: that is taken from every latent.
        scale: that it is multiplied by afterwards.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], shift: float, scale: float) -> None:
        self.paths, self.shift, self.scale = list(paths), shift, scale
        self._ends = np.cumsum(counts)
        self._maps: dict[int, Tensor] = {}

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Scaled latents of these rows, (B, C, h, w) float32, in their order."""
        files = np.searchsorted(self._ends, rows, side="right")
        firsts = np.concatenate([[0], self._ends])[files]
        out: Tensor | None = None
        for file in np.unique(files):
            places = np.flatnonzero(files == file)
            found = self._map(int(file))[torch.from_numpy((rows - firsts)[places])].float()
            if out is None:
                out = torch.empty(len(rows), *found.shape[1:])
            out[torch.from_numpy(places)] = found
        assert out is not None
        return out.sub_(self.shift).mul_(self.scale)

    def _map(self, file: int) -> Tensor:
        if file not in self._maps:
            self._maps[file] = _tensors(self.paths[file], ("latents",))["latents"]
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # loader processes open their own


class LatentSplit(ImageSplit):
    """Latents and labels of one split.

    Args:
        name: name of the split.
        files: where the latents are.
        rows: which of them belong to the split, in its order, (n,) int64.
        labels: class or caption of each, (n,) int64.
    """

    def __init__(self, name: str, files: LatentFiles, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.name, self.files, self.rows, self.labels = name, files, rows, labels

    def reordered(self, order: NDArray[np.int64]) -> LatentSplit:
        """The same split with its n samples in another order, (n,) int64."""
        return LatentSplit(self.name, self.files, self.rows[order], self.labels[order])

    def samples(self, indices: NDArray[np.int64]) -> Tensor:
        """Scaled latents of the samples at these indices, (B, C, h, w) float32."""
        return self.files.read(self.rows[indices])

    def hold(self) -> None:
        """Latents stay on the disk; the system keeps in memory what it has room for."""


class LatentData(ImageData):
    """Latents with class labels or captions that `diffratio precompute` wrote; a batch is as `ImageData`'s.

    `images` are scaled latents, (B, C, h, w). Nothing is mirrored: a VAE's latents of a mirrored picture are not the
    mirrored latents.

    Args:
        source: the folder.
        vae: folder or hub id of the VAE that decodes samples; None takes the one that the manifest names.
        name: what reports call the set; the manifest's name by default.
        train_split: split to train on.
        validation_split: held-out split; None, or a folder with one split only: a part of the training split.
        validation_fraction: size of that part, in (0, 1).
        label_dropout: fraction of training labels replaced by the null label (for classifier-free guidance).
        batch_size: samples of one process in one batch.
        num_workers: loader processes.
        seed: of order, label drops and of the held-out part.
        verify: whether the sha256 of every file is computed first, which reads all of them.

    Raises:
        DiffratioError: no such folder, an unfinished or damaged one, or an argument out of range.
    """

    def __init__(
        self,
        source: str,
        *,
        vae: str | None = None,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str | None = "validation",
        validation_fraction: float = 0.05,
        label_dropout: float = 0.1,
        batch_size: int = 96,
        num_workers: int = 0,
        seed: int = 0,
        verify: bool = False,
    ) -> None:
        self.manifest: Manifest = read_manifest(source, verify)
        super().__init__(
            source,
            image_size=self.manifest.image_size,
            channels=3,
            num_classes=self.manifest.classes,
            name=name or self.manifest.name,
            train_split=train_split,
            validation_split=validation_split,
            validation_fraction=validation_fraction,
            flip=False,
            label_dropout=label_dropout,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.vae = vae
        self._coder: LatentCoder | None = None
        self._decoded: dict[str, tuple[int, tuple[Tensor, Tensor]]] = {}

    def prepare_data(self) -> None:
        """Nothing is to be downloaded."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the files and reads labels and captions, no latents.

        Raises:
            DiffratioError: a split that is not there, or files that do not hold what the manifest says.
        """
        if self._splits is not None:
            return
        held, there = self.validation_split, self.manifest.splits
        names = [self.train_split, *([held] if held is not None and (held in there or len(there) > 1) else [])]
        for name, argument in zip(names, ("train_split", "validation_split"), strict=False):
            if name not in there:
                raise DiffratioError(
                    f"data source {self.source!r} has no split {name!r}; it has {', '.join(there)}: "
                    f"set data.{argument} to one"
                )
        parts: list[CaptionPart] = []
        splits = [self._open(name, parts) for name in names]
        if self.manifest.text is not None:
            assert self.manifest.null is not None
            null = _captions(self._folder / self.manifest.null.file, 1, bool(self.manifest.text.pooled))
            self._captions = MappedCaptions(parts, null, self.manifest.text)
        self._class_names = list(self.manifest.class_names)
        if len(splits) == 1:
            kept, part = self._partition(len(splits[0]))
            self._splits = splits[0].reordered(kept), self._in_turn(splits[0].reordered(part))
        else:
            self._splits = splits[0], self._in_turn(splits[1])

    def coder(self) -> LatentCoder:
        """The VAE that made the latents, loaded once.

        Raises:
            DiffratioError: it is not there, or another one is.
        """
        if self._coder is None:
            source = self.vae or self.manifest.vae.name
            try:
                coder = load_vae(source)
            except DiffratioError as error:
                raise DiffratioError(f"{error}; set data.vae") from None
            self.check_vae(coder.vae, source)
            self._coder = coder
        return self._coder

    def check_vae(self, vae: Any, source: str) -> None:
        """Raises DiffratioError where a VAE is not the one that made the latents."""
        found, own = identify(vae, source), self.manifest.vae
        if found != own:
            raise DiffratioError(
                f"latents in {self.source!r} were made by vae {own}, and {source!r} has {found}; "
                "precompute them anew with that one, or choose the model that they were made for"
            )

    def check_pipeline(self, pipe: Any, source: str) -> None:
        """Checks a pipeline against the latents and their captions.

        Args:
            pipe: of diffusers, dense or routed.
            source: where it came from, for the message.

        Raises:
            DiffratioError: no VAE or another one, or another text encoder or number of tokens.
        """
        if getattr(pipe, "vae", None) is None:
            raise DiffratioError(f"{source!r} samples pictures without a VAE, and {self.source!r} holds latents")
        self.check_vae(pipe.vae, source)
        backbone = backbone_of(pipe.transformer)
        side = backbone.sample_side(pipe.transformer)
        if side != self.manifest.latent_size:
            raise DiffratioError(
                f"{self.source!r} holds latents of {self.manifest.latent_size}x{self.manifest.latent_size}, and "
                f"{source!r} samples {side}x{side}; precompute them with data.image_size="
                f"{side * self.manifest.vae.factor}"
            )
        own, encoder = self.manifest.text, getattr(pipe, "text_encoder", None)
        if own is None or encoder is None:
            return
        config, pooled = encoder.config, backbone.pooled_width(pipe.transformer)
        tokens = backbone.text_tokens(pipe.transformer)
        width = int(config.hidden_size if hasattr(config, "hidden_size") else config.d_model)
        if pooled:  # the encoder of that name is one of several, and not the one that gives the width
            width = backbone.text_width(pipe.transformer)
        made = pipeline_text(source) if Path(source).is_dir() else None
        found = (made.revision if made is not None else None) or own.revision
        if (found, tokens, width, pooled) != (own.revision, own.tokens, own.width, own.pooled):
            raise DiffratioError(
                f"captions in {self.source!r} are text of {own}, and {source!r} reads {tokens} tokens of {width}"
                f"{f', pooled {pooled},' if pooled else ''} by an encoder of revision {found}; precompute them anew "
                f"with text={source} tokens={tokens}"
            )

    def held_out_pictures(self, n: int) -> tuple[Tensor, Tensor]:
        """`held_out` as pictures: decoded, so that they differ from samples by what the transformer does alone.

        Returns:
            images (n, 3, H, W) float32 in [-1, 1] and labels (n,) int64.
        """
        return self._pictures("held out", n)

    def reference_pictures(self, n: int) -> tuple[Tensor, Tensor]:
        """`reference` as pictures; see `held_out_pictures`."""
        return self._pictures("reference", n)

    def _pictures(self, which: str, n: int) -> tuple[Tensor, Tensor]:
        if which not in self._decoded or self._decoded[which][0] != n:
            latents, labels = self.held_out(n) if which == "held out" else self.reference(n)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            coder = self.coder().to(device)
            parts = [coder.decode(part.to(device)).cpu() for part in latents.split(64)]
            self._decoded[which] = n, (torch.cat(parts), labels)
        return self._decoded[which][1]

    @property
    def _folder(self) -> Path:
        return Path(self.source).expanduser()

    def _open(self, name: str, parts: list[CaptionPart]) -> LatentSplit:
        """A split; its captions are appended to `parts`."""
        vae, shards = self.manifest.vae, self.manifest.splits[name]
        size = self.manifest.latent_size
        labels = []
        first = sum(len(part.texts) for part in parts)
        for shard in shards:
            path = self._folder / shard.file
            found = _tensors(path, ("latents", "labels"))
            shape = (shard.samples, vae.channels, size, size)
            if tuple(found["latents"].shape) != shape or str(found["latents"].dtype)[6:] != self.manifest.dtype:
                raise DiffratioError(
                    f"{str(path)!r} holds latents {tuple(found['latents'].shape)} and the manifest says {shape}; "
                    "precompute them anew"
                )
            most = self.manifest.classes if self.manifest.text is None else shard.captions
            own = _labels(path, found["labels"], shard.samples, most)
            if self.manifest.text is not None:
                parts.append(_captions(path, shard.captions, bool(self.manifest.text.pooled)))
                own, first = own + first, first + shard.captions
            labels.append(own)
        paths, counts = [self._folder / shard.file for shard in shards], [shard.samples for shard in shards]
        files = LatentFiles(paths, counts, vae.shift, vae.scale)
        return LatentSplit(name, files, np.arange(self.manifest.samples(name)), np.concatenate(labels))


def _labels(path: Path, labels: Tensor, samples: int, most: int | None) -> NDArray[np.int64]:
    """Class or caption of each latent of a file, (n,) int64; `most` is how many there are, None without classes."""
    if labels.dtype != torch.int64 or tuple(labels.shape) != (samples,):
        raise DiffratioError(
            f"{str(path)!r} holds labels {tuple(labels.shape)} of {str(labels.dtype)[6:]}, not {samples} of int64; "
            "precompute them anew"
        )
    wrong = (labels < 0) | (labels >= (1 if most is None else most))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DiffratioError(
            f"{str(path)!r}: row {row} has label {int(labels[row])}, and there are {1 if most is None else most}; "
            "precompute them anew"
        )
    return labels.numpy()


def _captions(path: Path, count: int, pooled: bool) -> CaptionPart:
    found = _tensors(path, ("states", "offsets", "captions", *(("pooled",) if pooled else ())))
    try:
        texts = parse_json(found["captions"].numpy().tobytes())
    except (ValueError, TypeError) as error:
        raise DiffratioError(f"captions in {str(path)!r} cannot be read ({error}); precompute them anew") from None
    if not isinstance(texts, list) or len(texts) != count:
        raise DiffratioError(f"{str(path)!r} does not hold the {count} captions of the manifest; precompute them anew")
    states, offsets, pooled_states = found["states"], found["offsets"], found.get("pooled")
    floating = states.is_floating_point() and (pooled_states is None or pooled_states.is_floating_point())
    if not floating or offsets.dtype != torch.int64 or offsets.ndim != 1:
        raise DiffratioError(f"{str(path)!r} does not hold states of captions; precompute them anew")
    return CaptionPart(tuple(map(str, texts)), states, offsets.clone(), pooled_states)


def _tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a file as views of a memory map."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise DiffratioError(f"{str(path)!r} is damaged or cut short ({error}); copy it again") from None
