"""The token grid: which place in the picture each image token comes from."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.errors import DiffratioError


@dataclass(frozen=True)
class TokenGrid:
    """A grid of image tokens in raster order.

    Args:
        height: rows of tokens.
        width: tokens in a row.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if type(self.height) is not int or type(self.width) is not int or self.height < 1 or self.width < 1:
            raise DiffratioError(f"token grid {self.height!r}x{self.width!r}: both sides must be integers from 1")

    @property
    def tokens(self) -> int:
        """Number of image tokens N."""
        return self.height * self.width
