"""Efficiency: what saved arithmetic is worth in time."""

from __future__ import annotations

import math

from diffratio.errors import DiffratioError


def efficiency(t: float, t_dense: float, macs_fraction: float) -> float:
    """Share of the saved arithmetic that turns into saved time: (1 - t / t_dense) / (1 - macs_fraction).

    Args:
        t: time of the run under the method.
        t_dense: time of the dense run, timed interleaved with it; any unit, the same in both.
        macs_fraction: MACs of the run under the method / MACs of the dense run.

    Returns:
        0 = no gain, 1 = all of it, below 0 = slower than dense. A method that saves nothing (`macs_fraction` of 1 and
        above) scores 0 whatever its time.

    Raises:
        DiffratioError: times that are not positive or a negative fraction.
    """
    if not (0 < t < math.inf and 0 < t_dense < math.inf and 0 <= macs_fraction < math.inf):
        raise DiffratioError(
            f"efficiency needs positive times and a MACs fraction of at least 0, got t={t:g}, t_dense={t_dense:g}, "
            f"macs_fraction={macs_fraction:g}"
        )
    saved = 1.0 - macs_fraction
    # Below a millionth the quotient would be timing noise divided by rounding.
    return (1.0 - t / t_dense) / saved if saved > 1e-6 else 0.0
