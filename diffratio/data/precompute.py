"""Writes a data set as latents and text states, once, so that training needs neither VAE nor text encoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffratio.conditions import Captions, EncoderSet, TextEncoder, encode_captions, text_encoder
from diffratio.conditions.encoders import PACKAGED
from diffratio.conditions.pipelines import local_folder, pipeline_text
from diffratio.data.feed import Feed, FeedSettings, Row, open_feeds
from diffratio.data.manifest import DTYPES, MANIFEST, LatentShard, Manifest, read_manifest, write_manifest
from diffratio.data.split import to_unit_range
from diffratio.errors import DiffratioError, unknown
from diffratio.files import atomic_file, read_json, sha256, writable_folder, write_json
from diffratio.plain import MOST, typed, whole
from diffratio.sampling.processes import Team
from diffratio.sampling.vae import LatentCoder, load_vae

JOB = "job.json"  # of an unfinished folder
NULL = "null.safetensors"


@dataclass(frozen=True)
class PrecomputeSettings:
    """What `configs/precompute.yaml` holds, beside data.

    Args:
        out: folder to write.
        vae: folder or hub id of a VAE, or of a pipeline that has one.
        text: of the text encoder: `minilm`, a folder or a hub id, also of a pipeline; None takes data.text.encoder.
        tokens: that captions are cut and padded to; None takes data.text.tokens, or what the pipeline pads to.
        dtype: of the stored latents; states of captions are float16.
        shard_size: samples in a file.
        batch_size: pictures encoded together.
        workers: threads that decode pictures.
        streaming: whether the source is read from the front instead of copied to this machine first.
        device: where the encoders run; `auto` takes a GPU where there is one.
    """

    out: str
    vae: str
    text: str | None = None
    tokens: int | None = None
    dtype: str = "float16"
    shard_size: int = 1000
    batch_size: int = 16
    workers: int = 2
    streaming: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for name in ("shard_size", "batch_size", "workers"):
            whole(name, getattr(self, name), 1, MOST if name != "workers" else 256)
        if self.tokens is not None:
            whole("tokens", self.tokens, 2, MOST)
        if self.text == "":
            raise DiffratioError("text='': give a name, a folder or a hub id, or null for data.text.encoder")


def precompute(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Encodes a data set, or what is missing of it.

    In several processes (accelerate, torchrun) every process must call it: they share the shards.

    Args:
        cfg: composed `precompute` config as plain data.

    Returns:
        The folder, samples by split, images a second of this call, and how many shards stood there already.

    Raises:
        DiffratioError: bad settings, a folder that holds another set, or a picture or caption that cannot be read.
    """
    settings = typed(PrecomputeSettings, {one.name: cfg[one.name] for one in dataclasses.fields(PrecomputeSettings)})
    data, out, team = dict(cfg["data"]), Path(settings.out), Team()
    if data.get("buckets") is not None:
        raise DiffratioError(
            f"data.buckets={data['buckets']!r}: latents are precomputed in one size; set data.buckets=null, or train "
            "buckets on pixels"
        )
    coder = team.together(lambda: load_vae(settings.vae).to(team.device(settings.device)))
    encoder, prepared = team.together(lambda: _encoder(settings, data, team.device(settings.device)))
    reading = _reading(data, encoder is not None)
    if reading.image_size % coder.id.factor:
        raise DiffratioError(
            f"data.image_size={reading.image_size} is no multiple of {coder.id.factor}, the side of the picture that "
            f"one latent stands for ({coder.id.name}); set data.image_size"
        )
    feeds, names = team.together(lambda: open_feeds(reading, settings.streaming))
    empty = Manifest(
        reading.name, reading.source, reading.image_size, settings.dtype, coder.id,
        None if encoder is None else encoder.identity, prepared, reading.num_classes, tuple(names),
        {feed.split: () for feed in feeds}, None if encoder is None else LatentShard(NULL, 0, 1, 0, ""),
    )  # fmt: skip
    job = _job(empty, reading, settings, feeds)
    if team.on_main(lambda: _begin(out, job, empty)):
        manifest = read_manifest(out)
        kept = sum(len(shards) for shards in manifest.splits.values())
        return _answer(manifest, out, 0, 0.0, kept, 0)
    started = time.perf_counter()
    mine = _Share(out, job, settings, reading, coder, encoder, prepared, team)
    counts = team.together(lambda: [mine.encode(feed) for feed in feeds])
    seconds = time.perf_counter() - started
    images, kept = _total(team, sum(counts)), mine.kept
    if encoder is not None:
        team.on_main(lambda: mine.write_null())
    team.on_main(lambda: _finish(out, job, empty, feeds, settings.shard_size))
    return _answer(read_manifest(out), out, images, seconds, kept, mine.cut)


class _Share:
    """What one process encodes."""

    def __init__(
        self,
        out: Path,
        job: str,
        settings: PrecomputeSettings,
        reading: FeedSettings,
        coder: LatentCoder,
        encoder: TextEncoder | EncoderSet | None,
        prepared: str,
        team: Team,
    ) -> None:
        self.out, self.job, self.settings, self.reading = out, job, settings, reading
        self.coder, self.encoder, self.prepared, self.team = coder, encoder, prepared, team
        self.kept = self.cut = 0

    def encode(self, feed: Feed) -> int:
        """Writes the shards of a split that are this process's and not there yet; returns how many pictures."""
        from tqdm.auto import tqdm

        def wanted(number: int) -> bool:
            if number in seen:
                return seen[number]
            mine = number % self.team.size == self.team.rank
            there = mine and _job_of(self.out / _name(feed.split, number)) == self.job
            self.kept += there
            seen[number] = mine and not there
            return seen[number]

        seen: dict[int, bool] = {}
        done = 0
        disable = None if self.team.is_main else True  # None: shown on a terminal, quiet in a log file
        with (
            ThreadPoolExecutor(self.settings.workers) as threads,
            tqdm(desc=feed.split, unit="img", disable=disable, total=feed.rows) as bar,
        ):
            for number, rows in feed.shards(self.settings.shard_size, wanted):
                tensors = {"latents": self._latents(feed.split, rows, threads, bar)} | self._labels(rows)
                _save(self.out / _name(feed.split, number), tensors, self.job)
                done += len(rows)
        return done

    def write_null(self) -> None:
        """Writes the empty caption."""
        assert self.encoder is not None
        captions = encode_captions([], self.encoder)
        tensors = {"states": captions.states, "offsets": captions.offsets, **_pooled(captions, 1), **_texts([""])}
        _save(self.out / NULL, tensors, self.job)

    def _latents(self, split: str, rows: Sequence[Row], threads: ThreadPoolExecutor, bar: Any) -> Tensor:
        size, pad, batch = self.reading.image_size, self.reading.pad_to, self.settings.batch_size
        dtype = getattr(torch, self.settings.dtype)
        found = []
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            pixels = np.stack(list(threads.map(lambda row: row.pixels(split, size, pad), part)))
            means = self.coder.encode(to_unit_range(torch.from_numpy(pixels))).cpu()  # (B, C, h, w)
            stored = means.to(dtype)
            if not bool(stored.isfinite().all()):
                row = part[int((~stored.isfinite()).flatten(1).any(1).nonzero()[0])].number
                raise DiffratioError(
                    f"row {row} of split {split!r} has latents that {self.settings.dtype} does not hold "
                    f"(up to {float(means.abs().max()):g}); set dtype=float32"
                )
            found.append(stored)
            bar.update(len(part))
        return torch.cat(found)

    def _labels(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Classes, or captions with their states; a caption that comes twice in a shard is stored once."""
        if self.encoder is None:
            return {"labels": torch.tensor([row.label for row in rows])}
        texts = list(dict.fromkeys(row.caption for row in rows))
        index = {text: number for number, text in enumerate(texts)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            captions = encode_captions([prepare(text, self.prepared) for text in texts], self.encoder)
        self.cut += sum("is cut to" in str(one.message) for one in caught)
        end = int(captions.offsets[-2])  # the empty caption is kept once, in a file of its own
        labels = torch.tensor([index[row.caption] for row in rows])
        tensors = {"labels": labels, "states": captions.states[:end], "offsets": captions.offsets[:-1]}
        return {**tensors, **_pooled(captions, len(texts)), **_texts(texts)}


def _pooled(captions: Captions, count: int) -> dict[str, Tensor]:
    """States of the first captions as a whole, where the encoder gives any."""
    return {} if captions.pooled is None else {"pooled": captions.pooled[:count]}


def prepare(text: str, how: str) -> str:
    """A caption as its encoder gets it."""
    return text.lower().strip() if how == "lower" else text


def _encoder(
    settings: PrecomputeSettings, data: Mapping[str, Any], device: str
) -> tuple[TextEncoder | EncoderSet | None, str]:
    given = {} if data.get("text") is None else data["text"]
    if not isinstance(given, Mapping):
        raise DiffratioError(f"data.text is {given!r}; it takes {{encoder: minilm, tokens: 24}}, or null")
    name = given.get("encoder") if settings.text is None else settings.text
    if name is not None and not isinstance(name, str):
        raise DiffratioError(f"text must be a name, a folder or a hub id, got {name!r}")
    if name is None:
        return None, "none"
    folder = None if name in PACKAGED else local_folder(name, download=True)
    made = pipeline_text(folder) if folder is not None else None
    tokens = settings.tokens
    if tokens is None and settings.text is None:
        tokens = given.get("tokens")
    tokens = tokens if tokens is not None or made is None else made.tokens
    if tokens is None:
        raise DiffratioError(f"text={name!r} does not say how many tokens a caption has; set tokens=N")
    loaded = text_encoder(str(folder or name), tokens, device)
    if str(folder or name) != name:
        loaded.identity = dataclasses.replace(loaded.identity, name=name)
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported():
        loaded.computing(torch.bfloat16)
    return loaded, "lower" if made is not None and made.lowered else "none"


def _reading(data: Mapping[str, Any], captions: bool) -> FeedSettings:
    values: dict[str, Any] = {
        one.name: data.get(one.name) for one in dataclasses.fields(FeedSettings) if one.name not in ("captions", "name")
    }
    if captions:  # a sample is conditioned on one of the two
        values["num_classes"] = None
    if type(values["image_size"]) is not int or values["image_size"] < 1:
        raise DiffratioError(f"data.image_size must be a whole number of pixels, got {values['image_size']!r}")
    return typed(FeedSettings, values | {"captions": captions, "name": data.get("name") or data["source"]}, "data")


def _job(empty: Manifest, reading: FeedSettings, settings: PrecomputeSettings, feeds: Sequence[Feed]) -> str:
    """Changes with everything that changes the files, but for rounding."""
    document = [empty.to_json(), dataclasses.asdict(reading), settings.shard_size, [feed.rows for feed in feeds]]
    for part in (document[0]["vae"], document[0]["text"] or {}):  # type: ignore[index]
        part.pop("name", None)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _begin(out: Path, job: str, empty: Manifest) -> bool:
    """Readies the folder; True where it is finished already."""
    writable_folder(out)
    for half in out.glob(".*.tmp"):  # of a process that was killed
        half.unlink(missing_ok=True)
    there = {one.name for one in out.iterdir()}
    if (out / MANIFEST).is_file():
        own = _job_of(out / next(iter(read_manifest(out).splits.values()))[0].file)
    elif not there or (there == {JOB} and (out / JOB).is_file()):  # nothing was written yet, of whatever job
        own = job
    elif (out / JOB).is_file():
        own = str(read_json(out / JOB, "job of a folder of latents").get("job"))
    else:
        raise DiffratioError(f"out={str(out)!r} is not empty and holds no latents; choose another folder")
    if own != job:
        raise DiffratioError(
            f"out={str(out)!r} holds latents of another set, encoder, size, dtype or shard_size; choose another folder"
        )
    if (out / MANIFEST).is_file():
        return True
    write_json(out / JOB, {"job": job, **empty.to_json()})
    return False


def _finish(out: Path, job: str, empty: Manifest, feeds: Sequence[Feed], shard_size: int) -> None:
    splits = {feed.split: _shards(out, job, feed, shard_size) for feed in feeds}
    null = None if empty.null is None else _described(out / NULL)
    write_manifest(dataclasses.replace(empty, splits=splits, null=null), out)
    (out / JOB).unlink()


def _shards(out: Path, job: str, feed: Feed, size: int) -> tuple[LatentShard, ...]:
    pattern = re.compile(re.escape(feed.split) + r"-\d{5,}\.safetensors")
    files = sorted(path for path in out.iterdir() if pattern.fullmatch(path.name))
    if [path.name for path in files] != [_name(feed.split, number) for number in range(len(files))] or not files:
        raise DiffratioError(f"split {feed.split!r} gave no samples, or its files in {str(out)!r} have gaps")
    found = tuple(_described(path) for path in files)
    whole = all(shard.samples == size for shard in found[:-1]) and all(_job_of(path) == job for path in files)
    if not whole or feed.rows not in (None, sum(shard.samples for shard in found)):
        raise DiffratioError(f"files of split {feed.split!r} in {str(out)!r} are of another job; choose another folder")
    return found


def _described(path: Path) -> LatentShard:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        samples = file.get_slice("labels").get_shape()[0] if "labels" in file.keys() else 0  # noqa: SIM118
        captions = file.get_slice("offsets").get_shape()[0] - 1 if "offsets" in file.keys() else 0  # noqa: SIM118
    return LatentShard(path.name, samples, captions, path.stat().st_size, sha256(path))


def _name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor], job: str) -> None:
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata={"job": job})
        temporary.chmod(0o644)  # safetensors' files are their owner's alone


def _job_of(path: Path) -> str | None:
    """The job that wrote a shard; None where there is no whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("job")
    except (OSError, SafetensorError):
        return None


def _texts(texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = json.dumps(list(texts), ensure_ascii=False).encode()
    return {"captions": torch.frombuffer(bytearray(encoded), dtype=torch.uint8)}


def _total(team: Team, count: int) -> int:
    if team.size == 1:
        return count
    from accelerate.utils import gather_object

    return sum(gather_object([count]))


def _answer(manifest: Manifest, out: Path, images: int, seconds: float, kept: int, cut: int) -> dict[str, Any]:
    shards = [shard for split in manifest.splits.values() for shard in split]
    return {
        "out": str(out),
        "samples": {split: manifest.samples(split) for split in manifest.splits},
        "captions": sum(shard.captions for shard in shards),
        "latent": [manifest.vae.channels, manifest.latent_size, manifest.latent_size],
        "vae": str(manifest.vae),
        "text": None if manifest.text is None else str(manifest.text),
        "shards": len(shards),
        "kept_shards": kept,
        "bytes": sum(shard.bytes for shard in shards),
        "images": images,
        "captions_cut": cut,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 2) if images else None,
    }


def in_words(answer: Mapping[str, Any]) -> str:
    """The answer as two lines."""
    splits = ", ".join(f"{count} {name}" for name, count in answer["samples"].items())
    size = "x".join(map(str, answer["latent"]))
    if not answer["images"]:
        return f"{answer['out']}: finished before ({splits} latents of {size})"
    cut = f"; {answer['captions_cut']} captions were cut to the encoder's tokens" if answer["captions_cut"] else ""
    total = f"{answer['captions']} captions, {answer['bytes'] / 1e6:.1f} MB"
    return (
        f"{answer['out']}: {splits} latents of {size}, {total}{cut}"
        f"\n{answer['images']} images in {answer['seconds']:g} s ({answer['images_per_second']:g} images/s), "
        f"{answer['kept_shards']} shards stood there already"
    )
