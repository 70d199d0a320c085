"""Sets of text encoders: what the pipelines of families that read several make of a prompt, by those pipelines."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio.conditions.digest import ENCODER, TOKENIZER, encoders_revision
from diffratio.conditions.identity import EncoderId
from diffratio.conditions.index import INDEX, read_index
from diffratio.errors import DiffratioError, first_line
from diffratio.files import read_json

_BATCH = 8
_LONGEST = 512  # T5 tokens that the pipelines take
_WITHOUT = ("transformer", "vae", "scheduler", "image_encoder", "feature_extractor")  # parts that read no text


@dataclass(frozen=True)
class _Kind:
    """How a pipeline class prepares prompts.

    Args:
        clips: parts whose pooled states stand for the whole text, side by side.
        pooled: key of their configuration that says how wide that state is.
        t5: the part that gives token states of full width, and beside it its tokenizer.
        clip_tokens: whether token states of the CLIP encoders stand before those of T5.
    """

    clips: tuple[str, ...]
    pooled: str
    t5: tuple[str, str]
    clip_tokens: bool

    @property
    def encoders(self) -> tuple[str, ...]:
        """All parts that hold weights."""
        return (*self.clips, self.t5[0])


_KINDS = {
    "StableDiffusion3Pipeline": _Kind(
        ("text_encoder", "text_encoder_2"), "projection_dim", ("text_encoder_3", "tokenizer_3"), True
    ),
    "FluxPipeline": _Kind(("text_encoder",), "hidden_size", ("text_encoder_2", "tokenizer_2"), False),
}


class EncoderSet:
    """The text encoders of a pipeline folder; made by `encoder_set`. Their weights are loaded when first needed.

    Args:
        identity: what files name them by.
        folder: of the pipeline.
        device: where they run.
    """

    def __init__(self, identity: EncoderId, folder: Path, device: torch.device | str = "cpu") -> None:
        self.identity, self.folder, self.device = identity, folder, torch.device(device)
        self._dtype = torch.float32
        self._pipe: Any = None

    def computing(self, dtype: torch.dtype) -> EncoderSet:
        """Sets the computing type."""
        self._dtype, self._pipe = dtype, None
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the pipeline's own `encode_prompt` gives; a text of more tokens than it takes is cut, as it does.

        Args:
            texts: B texts.

        Returns:
            States (B, T, C) and pooled states (B, P), float16 on the CPU.

        Raises:
            DiffratioError: encoders that cannot be loaded, or do not give what their configurations say.
        """
        states, pooled = [], []
        for first in range(0, len(texts), _BATCH):
            found, whole = self._prompts(list(texts[first : first + _BATCH]))
            states.append(found.half().cpu())
            pooled.append(whole.half().cpu())
        together, wholes = torch.cat(states), torch.cat(pooled)
        own = self.identity
        if together.shape[1:] != (own.tokens, own.width) or wholes.shape[1:] != (own.pooled,):
            raise DiffratioError(
                f"text encoders of {own.name!r} give {tuple(together.shape[1:])} and {tuple(wholes.shape[1:])}, and "
                f"their configurations say {own}; mend max_position_embeddings, or model_max_length of the tokenizers"
            )
        if not (together.isfinite().all() and wholes.isfinite().all()):
            raise DiffratioError(f"text encoders of {own.name!r} give states that float16 does not hold")
        return together, wholes

    def _prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        pipe = self._loaded()
        kind = _KINDS[type(pipe).__name__]
        longest = self.identity.tokens - (_clip_tokens(self.folder, kind) if kind.clip_tokens else 0)
        self._warn_of_long(texts, getattr(pipe, kind.t5[1]), longest)
        with _quiet(type(pipe).__module__):
            if kind.clip_tokens:
                states, _, pooled, _ = pipe.encode_prompt(
                    texts, None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=longest
                )
            else:
                states, pooled, _ = pipe.encode_prompt(texts, None, self.device, max_sequence_length=longest)
        return states, pooled

    def _warn_of_long(self, texts: Sequence[str], tokenizer: Any, tokens: int) -> None:
        """Of T5's cut alone: CLIP takes 77 tokens, whatever the text, and T5 is there for longer ones."""
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            if len(ids) > tokens:
                lost = tokenizer.decode(ids[tokens - 1 :], skip_special_tokens=True)
                warnings.warn(
                    f"prompt of {len(ids)} tokens is cut to the {tokens} that T5 of {self.identity.name} takes here: "
                    f"{lost!r} is lost",
                    stacklevel=4,
                )

    def _loaded(self) -> Any:
        if self._pipe is None:
            import diffusers

            kind: Any = getattr(diffusers, _class_of(self.folder) or "")
            none = {part: None for part in _WITHOUT if part in inspect.signature(kind.__init__).parameters}
            try:
                pipe = kind.from_pretrained(
                    self.folder, local_files_only=True, use_safetensors=True, torch_dtype=self._dtype, **none
                )
            except Exception as error:  # damaged files of several formats raise anything
                raise DiffratioError(
                    f"text encoders of {self.identity.name!r} cannot be loaded ({first_line(error, 200)}); "
                    "give the folder or hub id of a whole pipeline"
                ) from None
            self._pipe = pipe.to(self.device)
        return self._pipe


def has_several(folder: str | Path) -> bool:
    """Whether a folder is a pipeline that reads several text encoders together."""
    return _class_of(Path(folder)) in _KINDS


def encoder_set(name: str, folder: Path, tokens: int, device: torch.device | str = "cpu") -> EncoderSet:
    """The text encoders of a pipeline folder, whose weights are not loaded yet.

    Args:
        name: what it is called by.
        folder: of the pipeline.
        tokens: of a text together; those of CLIP, where they count, and T5's.
        device: where they run.

    Raises:
        DiffratioError: a part is missing, or the number of tokens is not one that it takes.
    """
    kind = _kind(folder)
    most, least = _tokens(folder, kind, _LONGEST), _tokens(folder, kind, 1)
    if not least <= tokens <= most:
        raise DiffratioError(
            f"text encoders of {name!r} take {least} to {most} tokens together, asked for {tokens}; "
            f"its pipeline uses {usual_tokens(folder)}"
        )
    width = int(_config(folder, kind.t5[0])["d_model"])
    pooled = sum(int(_config(folder, clip)[kind.pooled]) for clip in kind.clips)
    identity = EncoderId(name, encoders_revision(folder, kind.encoders), tokens, width, pooled)
    return EncoderSet(identity, folder, device)


def usual_tokens(folder: Path) -> int | None:
    """Tokens of a text together where its pipeline is told nothing; None where the encoders are not in the folder."""
    import diffusers

    kind = _KINDS[str(_class_of(folder))]
    if not all((folder / part).is_dir() for part in kind.encoders):
        return None
    call = getattr(diffusers, str(_class_of(folder))).__call__
    return _tokens(folder, kind, int(inspect.signature(call).parameters["max_sequence_length"].default))


def set_revision(folder: Path) -> str | None:
    """Digest over all encoders of a set; None where they are not in the folder."""
    kind = _KINDS[str(_class_of(folder))]
    there = all((folder / part).is_dir() for part in kind.encoders)
    return encoders_revision(folder, kind.encoders) if there else None


def hub_folder(name: str, download: bool = False) -> Path | None:
    """The folder of a hub pipeline's text encoders and tokenizers on this machine, or None.

    Args:
        name: hub id of a pipeline.
        download: whether they may be downloaded; otherwise what lies in the hub's cache is all.

    Raises:
        DiffratioError: they cannot be downloaded.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [INDEX, f"{ENCODER}*/*", f"{TOKENIZER}*/*"]
    leave = ["*.fp16*", "*.bin", "*.msgpack", "*.h5"]  # the same weights once more
    try:
        found = Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=leave, local_files_only=not download)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if download and not isinstance(error, LocalEntryNotFoundError):
            why = first_line(error, 200)
            raise DiffratioError(f"text encoder {name!r} cannot be had from the hub ({why})") from None
        return None
    return found if (found / ENCODER).is_dir() else None


@contextlib.contextmanager
def _quiet(module: str) -> Iterator[None]:
    """diffusers warns of every text that CLIP cuts."""
    logger = logging.getLogger(module)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _kind(folder: Path) -> _Kind:
    kind = _KINDS[str(_class_of(folder))]
    missing = [part for part in kind.encoders if not (folder / part / "config.json").is_file()]
    if missing:
        raise DiffratioError(
            f"{str(folder)!r} lacks {', '.join(missing)}, and texts are encoded by all encoders of the pipeline; "
            "give the folder or hub id of a whole one"
        )
    return kind


def _tokens(folder: Path, kind: _Kind, t5: int) -> int:
    return t5 + (_clip_tokens(folder, kind) if kind.clip_tokens else 0)


def _clip_tokens(folder: Path, kind: _Kind) -> int:
    return int(_config(folder, kind.clips[0]).get("max_position_embeddings", 77))  # as CLIP's configuration leaves out


def _config(folder: Path, part: str) -> dict[str, Any]:
    found = read_json(folder / part / "config.json", "text encoder configuration")
    if not isinstance(found, dict):
        raise DiffratioError(f"{str(folder / part / 'config.json')!r} is no configuration")
    # files hold what differs from the class's defaults, or all of it
    defaults = {"hidden_size": 512, "projection_dim": 512, "d_model": 512}
    for key in (*defaults, "max_position_embeddings"):
        if key in found and type(found[key]) is not int:
            raise DiffratioError(
                f"{str(folder / part / 'config.json')!r}: {key} must be an integer, got {found[key]!r:.80}"
            )
    return defaults | found


def _class_of(folder: Path) -> str | None:
    """The pipeline class that a folder names, None where it is no pipeline."""
    if not (folder / INDEX).is_file():
        return None
    return str(read_index(folder / INDEX)["_class_name"])
