"""The contract of conditions: a whole number for each sample, and the arguments that a transformer takes for it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Conditions(ABC):
    """Conditions by number. Data, draws, records and guidance handle the number alone.

    Attributes:
        null: the number that means "no condition"; None where there is none.
    """

    null: int | None

    @abstractmethod
    def arguments(self, labels: Tensor) -> dict[str, Tensor]:
        """The transformer's arguments for conditions by number, (B,) int64, on the device of `labels`."""

    @abstractmethod
    def in_turn(self, n: int) -> list[int]:
        """n conditions that stand for all: each in turn."""


class Classes(Conditions):
    """Classes: the number is the class.

    Args:
        null: class that means "no class".
    """

    def __init__(self, null: int | None = None) -> None:
        self.null = null

    def arguments(self, labels: Tensor) -> dict[str, Tensor]:
        """`class_labels` (B,)."""
        return {"class_labels": labels}

    def in_turn(self, n: int) -> list[int]:
        """Class i mod number of classes for sample i."""
        return [i % (self.null or 1) for i in range(n)]
