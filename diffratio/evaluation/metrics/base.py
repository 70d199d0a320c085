"""What a metric name stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from diffratio.evaluation.evidence import Evidence


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Args:
        description: one line for tables and help.
        better: which direction is better.
        minimum: fewest samples that it is defined for.
        measure: the figure, a list of figures (one a region), or None where the evidence does not hold what it needs.
        features: start of the extractor's id whose features it is named after; None takes any.
        package: module that it needs beside this package's own; None needs none.
        extra: the optional dependency that brings `package`.
    """

    description: str
    better: Literal["lower", "higher"]
    minimum: int
    measure: Callable[[Evidence], Any]
    features: str | None = None
    package: str | None = None
    extra: str | None = None
