"""Which text encoder, or set of encoders, made a text's states; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from diffratio.errors import DiffratioError


@dataclass(frozen=True)
class EncoderId:
    """Which encoder, or set of encoders, made a text's states; those of another do not fit.

    Args:
        name: `minilm`, a folder, or a hub id; where it was found, so that two that differ in it alone are equal.
        revision: of the weights; what a file's content hashes to where there is no better one, of all files of a set.
        tokens: tokens that a text is cut to, and padded to; of a set what all its encoders give together.
        width: channels of a token's state.
        pooled: channels of the one state that stands for a whole text beside those of its tokens; 0 where there is
            none. With it padding belongs to the text: models that read it do not mask padding.
    """

    name: str = field(compare=False)
    revision: str
    tokens: int
    width: int
    pooled: int = 0

    def __post_init__(self) -> None:
        for key in ("name", "revision"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise DiffratioError(f"text encoder: {key} must be a name, got {getattr(self, key)!r}")
        for key in ("tokens", "width"):
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= 1 << 16:
                raise DiffratioError(f"text encoder: {key} must be an integer of 1 to 65536, got {value!r}")
        if type(self.pooled) is not int or not 0 <= self.pooled <= 1 << 16:
            raise DiffratioError(f"text encoder: pooled must be an integer of 0 to 65536, got {self.pooled!r}")

    def __str__(self) -> str:
        pooled = f", pooled {self.pooled}" if self.pooled else ""
        return f"{self.name}@{self.revision} ({self.tokens} tokens of {self.width}{pooled})"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `EncoderId(**document)` is its inverse. What files of one encoder said before stays as it was."""
        document = dataclasses.asdict(self)
        if not self.pooled:
            del document["pooled"]
        return document
