"""Captions by number, each with its tokens' states; kept on disk with the encoder that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio.conditions.base import Conditions
from diffratio.conditions.encoders import TextEncoder, text_encoder
from diffratio.conditions.identity import EncoderId
from diffratio.conditions.several import EncoderSet
from diffratio.errors import DiffratioError
from diffratio.files import atomic_folder, cache_folder, read_json, sha256, write_json

_FORMAT, _VERSION = "diffratio-captions", 1
_MANIFEST = "manifest.json"
_SHARD = 20_000  # captions in one file
_LARGE_SHARD = 500  # of a set of encoders
_PART = 1_000  # captions encoded between two reports
_LARGE_PART = 64  # of a set of encoders, whose states are megabytes a caption
_ON_DEVICE = 2 << 30  # bytes of states that may lie on an accelerator


class Captions(Conditions):
    """Captions with their states; padding is not stored.

    The last number, `null`, is the empty caption: it stands for no condition.

    Args:
        texts: n captions.
        states: of all tokens of all captions and then of the empty one, one after another, (tokens, C).
        offsets: where each caption's tokens begin in `states`, and the end of the last, (n + 2,) int64.
        encoder: what made the states.
        pooled: the state that stands for each caption, the empty one last, (n + 1, P); None where the encoder gives
            none. Captions that have one are stored with their padding, which such models read.
    """

    null: int

    def __init__(
        self,
        texts: Sequence[str],
        states: Tensor,
        offsets: Tensor,
        encoder: EncoderId,
        pooled: Tensor | None = None,
    ) -> None:
        lengths = offsets.diff()
        if (
            offsets.shape != (len(texts) + 2,)
            or states.shape != (int(offsets[-1]), encoder.width)
            or int(offsets[0]) != 0
            or int(lengths.min()) < (encoder.tokens if encoder.pooled else 1)
            or int(lengths.max()) > encoder.tokens
            or (None if pooled is None else tuple(pooled.shape))
            != ((len(texts) + 1, encoder.pooled) if encoder.pooled else None)
        ):
            raise DiffratioError(
                f"states of shape {tuple(states.shape)} with {len(offsets)} offsets are not those of {len(texts)} "
                f"captions and an empty one by {encoder}"
            )
        self.texts, self.states, self.offsets, self.encoder = list(texts), states, offsets, encoder
        self.pooled = pooled
        self.null = len(self.texts)
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def numbers(self, texts: Sequence[str]) -> list[int]:
        """Numbers of captions; raises DiffratioError for one that is not here."""
        index = {text: number for number, text in enumerate(self.texts)} | {"": self.null}
        for text in texts:
            if text not in index:
                raise DiffratioError(f"caption {text[:80]!r} is not among the {len(self)} encoded ones; encode it anew")
        return [index[text] for text in texts]

    def arguments(self, labels: Tensor) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, T, C) float32, and what goes with them.

        That is `encoder_attention_mask` (B, T) int64, 1 at text, or `pooled_projections` (B, P) float32 where the
        encoder gives a pooled state: families that read one take no mask.
        """
        states, offsets = self._on(labels.device)
        rows = labels.to(offsets.device)
        index = offsets[rows][:, None] + torch.arange(self.encoder.tokens, device=offsets.device)  # (B, T)
        valid = index < offsets[rows + 1][:, None]
        found = states[index.clamp_(max=len(states) - 1)].float() * valid[:, :, None]
        if self.pooled is not None:
            pooled = self.pooled[labels.to(self.pooled.device)].float()
            return {
                "encoder_hidden_states": found.to(labels.device),
                "pooled_projections": pooled.to(labels.device),
            }
        return {
            "encoder_hidden_states": found.to(labels.device),
            "encoder_attention_mask": valid.long().to(labels.device),
        }

    def in_turn(self, n: int) -> list[int]:
        """n captions evenly spread over all."""
        return [i * len(self) // n if n <= len(self) else i % len(self) for i in range(n)]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type == "cpu" or self.states.nbytes > _ON_DEVICE:
            return self.states, self.offsets
        if device not in self._there:
            self._there[device] = self.states.to(device), self.offsets.to(device)
        return self._there[device]

    def sentences(self) -> Tensor:
        """Each caption's pooled state, or the mean of its tokens', normalised to length 1, (n, P or C) float32."""
        if self.pooled is not None:
            return torch.nn.functional.normalize(self.pooled[:-1].float(), dim=1)
        lengths = self.offsets.diff()
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = torch.zeros(len(lengths), self.encoder.width).index_add_(0, owner, self.states.float())
        return torch.nn.functional.normalize(sums[:-1], dim=1)


def encode_captions(
    texts: Sequence[str], encoder: TextEncoder | EncoderSet, tick: Callable[[int], None] = lambda count: None
) -> Captions:
    """Encodes captions, and the empty one, to float16 states; autocast is left out, so that they are always the same.

    Args:
        texts: n captions.
        encoder: of text, or a set of several.
        tick: told how many more are done.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast(encoder.device.type, enabled=False):
        if isinstance(encoder, EncoderSet):
            return _encoded_by_several([*texts, ""], encoder, tick)
        return _encoded_by_one([*texts, ""], encoder, tick)


def _encoded_by_one(wanted: Sequence[str], encoder: TextEncoder, tick: Callable[[int], None]) -> Captions:
    states, lengths = [], []
    for first in range(0, len(wanted), _PART):
        part = wanted[first : first + _PART]
        found, mask = encoder.encode(part)
        states.append(found[mask.bool()].half())
        lengths.append(mask.sum(1))
        tick(len(part))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(lengths).cumsum(0)])
    return Captions(wanted[:-1], torch.cat(states), offsets, encoder.identity)


def _encoded_by_several(wanted: Sequence[str], encoder: EncoderSet, tick: Callable[[int], None]) -> Captions:
    """Captions of full length, padding and all."""
    states, pooled = [], []
    for first in range(0, len(wanted), _LARGE_PART):
        part = wanted[first : first + _LARGE_PART]
        found, whole = encoder.encode(part)
        states.append(found.flatten(0, 1))
        pooled.append(whole)
        tick(len(part))
    offsets = torch.arange(len(wanted) + 1) * encoder.identity.tokens
    return Captions(wanted[:-1], torch.cat(states), offsets, encoder.identity, torch.cat(pooled))


def save_captions(captions: Captions, folder: str | Path) -> Path:
    """Writes captions as a folder: `manifest.json` and safetensors files of a part of the captions each.

    Args:
        captions: to keep.
        folder: where to; replaced as a whole.
    """
    from safetensors.torch import save_file

    target = Path(folder)
    with atomic_folder(target) as temporary:
        shards: list[dict[str, Any]] = []
        size = _LARGE_SHARD if captions.encoder.pooled else _SHARD
        for first in range(0, len(captions) + 1, size):
            last = min(first + size, len(captions) + 1)
            begin, end = int(captions.offsets[first]), int(captions.offsets[last])
            name = f"captions-{len(shards):05d}.safetensors"
            tensors = {
                "states": captions.states[begin:end].contiguous(),
                "offsets": (captions.offsets[first : last + 1] - begin).contiguous(),
            }
            if captions.pooled is not None:
                tensors["pooled"] = captions.pooled[first:last].contiguous()
            save_file(tensors, temporary / name)
            shards.append({"file": name, "captions": last - first, "sha256": sha256(temporary / name)})
        (temporary / "captions.json").write_text(json.dumps(captions.texts, ensure_ascii=False), encoding="utf-8")
        encoder = captions.encoder.to_json()
        document = {"format": _FORMAT, "version": _VERSION, "encoder": encoder, "captions": len(captions)}
        write_json(temporary / _MANIFEST, document | {"dtype": str(captions.states.dtype)[6:], "shards": shards})
    return target


def load_captions(folder: str | Path, encoder: EncoderId | None = None) -> Captions:
    """Reads what `save_captions` wrote.

    Args:
        folder: where it is.
        encoder: what must have made it; None takes any.

    Raises:
        DiffratioError: no such folder, a damaged file, or the work of another encoder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    document = read_json(path / _MANIFEST, "manifest of captions")
    if not isinstance(document, dict) or document.get("format") != _FORMAT or document.get("version") != _VERSION:
        raise DiffratioError(f"{str(path / _MANIFEST)!r} is no manifest of captions of version {_VERSION}")
    try:
        made_by = EncoderId(**document["encoder"])
        shards = [(str(one["file"]), str(one["sha256"])) for one in document["shards"]]
    except (LookupError, TypeError) as error:
        raise DiffratioError(f"{str(path / _MANIFEST)!r} lacks a part ({error}); precompute it anew") from None
    if encoder is not None and made_by != encoder:
        raise DiffratioError(
            f"captions in {str(path)!r} were encoded by {made_by}, and {encoder} is asked for; precompute them anew"
        )
    texts: Any = read_json(path / "captions.json", "captions", 8 << 30)
    states, pooled, offsets, end = [], [], [torch.zeros(1, dtype=torch.long)], 0
    for name, digest in shards:
        file = path / Path(name).name  # a manifest does not name files elsewhere
        try:
            if sha256(file) != digest:
                raise DiffratioError(f"{str(file)!r} is damaged: it does not have the sha256 of the manifest")
            found = load_file(file)
            if found["offsets"].dtype != torch.int64 or found["offsets"].ndim != 1 or found["states"].ndim != 2:
                raise KeyError("states and offsets")
            states.append(found["states"])
            if made_by.pooled:
                pooled.append(found["pooled"])
            offsets.append(found["offsets"][1:] + end)
            end += int(found["offsets"][-1])
        except (OSError, SafetensorError, LookupError) as error:
            raise DiffratioError(f"{str(file)!r} cannot be read ({error}); precompute the captions anew") from None
    if not isinstance(texts, list) or not states:
        raise DiffratioError(f"{str(path)!r} holds no captions; precompute them anew")
    try:
        together, whole = torch.cat(states), torch.cat(pooled) if pooled else None
    except RuntimeError as error:
        raise DiffratioError(f"captions in {str(path)!r} do not fit together ({error}); precompute them anew") from None
    if not together.is_floating_point() or not (whole is None or whole.is_floating_point()):
        raise DiffratioError(f"{str(path)!r} does not hold states of captions; precompute them anew")
    return Captions([str(text) for text in texts], together, torch.cat(offsets), made_by, whole)


def cached_captions(texts: Sequence[str], encoder: str, tokens: int, say: Callable[[str], None]) -> Captions:
    """Encodes captions once: later calls read them from the cache folder.

    Args:
        texts: n captions.
        encoder: name of the encoder.
        tokens: of a caption.
        say: told before a long encoding.
    """
    loaded = text_encoder(encoder, tokens)
    own = loaded.identity
    made_by = [own.revision, own.tokens, own.width, *([own.pooled] if own.pooled else [])]
    key = hashlib.sha256(json.dumps([made_by, list(texts)]).encode()).hexdigest()[:16]
    folder = cache_folder() / "captions" / f"{Path(loaded.identity.name).name}-{key}"
    if (folder / _MANIFEST).is_file():
        try:
            return load_captions(folder, loaded.identity)
        except DiffratioError as error:
            say(f"{error}; encoding them again")
    if len(texts) > _PART:
        say(f"encoding {len(texts)} captions with {loaded.identity.name}, once; kept in {folder}")
    captions = encode_captions(texts, loaded)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_captions(captions, folder)
    except (OSError, DiffratioError) as error:
        say(f"captions are not kept ({error}); set DIFFRATIO_CACHE to a folder that can be written")
    return captions
