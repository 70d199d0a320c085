"""The token grid: which place in the picture each image token comes from."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.errors import DiffratioError

LARGEST_SIDE = 4096  # tokens at a side


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
        if not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in (self.height, self.width)):
            raise DiffratioError(
                f"token grid {self.height!r:.40}x{self.width!r:.40}: both sides must be integers from 1 to "
                f"{LARGEST_SIDE}"
            )

    @property
    def tokens(self) -> int:
        """Number of image tokens N."""
        return self.height * self.width
