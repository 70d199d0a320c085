"""Which text encoder made a text's states; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffratio.errors import DiffratioError


@dataclass(frozen=True)
class EncoderId:
    """Which encoder made a text's states; those of another do not fit.

    Args:
        name: `minilm`, a folder, or a hub id; where it was found, so that two that differ in it alone are equal.
        revision: of the weights; what a file's content hashes to where there is no better one.
        tokens: tokens that a text is cut to, and padded to.
        width: channels of a token's state.
    """

    name: str = field(compare=False)
    revision: str
    tokens: int
    width: int

    def __post_init__(self) -> None:
        for key in ("name", "revision"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise DiffratioError(f"text encoder: {key} must be a name, got {getattr(self, key)!r}")
        for key in ("tokens", "width"):
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= 1 << 16:
                raise DiffratioError(f"text encoder: {key} must be an integer of 1 to 65536, got {value!r}")

    def __str__(self) -> str:
        return f"{self.name}@{self.revision} ({self.tokens} tokens of {self.width})"
