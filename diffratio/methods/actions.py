"""What a step-level method can do with a whole step instead of computing it in full."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.errors import DiffratioError


@dataclass(frozen=True)
class Reuse:
    """The last output is returned, nothing is computed; for DDIM (eta 0) and flow Euler that drops the timestep.

    Args:
        extrapolate: whether it is carried on linearly from the last two computed outputs, by noise level; where there
            is only one, it is used as it is.
    """

    extrapolate: bool = False


@dataclass(frozen=True)
class Skip:
    """Blocks `first` to `last`, both included, are not run: their residual of the last full step is added instead.

    Args:
        first: index of the first skipped block, from 0.
        last: index of the last one.
        extrapolate: whether the residual is carried on linearly from those of the last two full steps, by noise level;
            where there is only one, it is used as it is.
    """

    first: int
    last: int
    extrapolate: bool = False

    def __post_init__(self) -> None:
        for bound in (self.first, self.last):
            if type(bound) is not int or bound < 0:
                raise DiffratioError(f"skipped blocks are given by index from 0, got {self.first!r} to {self.last!r}")
        if self.last < self.first:
            raise DiffratioError(
                f"skipped blocks {self.first} to {self.last} are none: the last comes before the first"
            )

    @property
    def blocks(self) -> tuple[int, int]:
        """The range, by which residuals are kept."""
        return self.first, self.last

    def covers(self, layer: int) -> bool:
        """Whether a block lies in the range."""
        return self.first <= layer <= self.last


StepAction = Reuse | Skip
