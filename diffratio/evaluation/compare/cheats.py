"""What an arm claims against what it does: counted MACs, the seed, and whether it does anything at all."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio import surgery
from diffratio.cost.count import count_macs
from diffratio.evaluation.compare.arms import Contender
from diffratio.sampling.generate import generate

UNDER = "MACs under-reported"
OVER = "MACs over-reported"
IGNORES_SEED = "ignores the seed"
NOT_REPRODUCIBLE = "not reproducible"
IDLE = "does nothing (efficiency 0)"

TOLERANCE = 0.01  # of the counted MACs; the analytic figures of this project agree to 0.1 %
_SAMPLES = 2
_EQUAL, _REPEATS = 1e-6, 1e-3  # on pictures in [-1, 1]; kernels that add in any order move the last digits


def probe(one: Contender, dense: Tensor | None, guidance_scale: float) -> tuple[tuple[str, ...], Tensor]:
    """Samples two pictures three times, and once with the counter on.

    Args:
        one: the arm.
        dense: what this function returned as pictures for the dense arm that it is paired with.
        guidance_scale: of the comparison.

    Returns:
        The flags, empty where nothing is wrong, each a name and what was measured; and the pictures.
    """

    def sample(seed: int, n: int = _SAMPLES) -> Tensor:
        return generate(
            one.pipe, n, seed=seed, batch_size=n, steps=one.steps, guidance_scale=guidance_scale,
            quiet=True, distributed=False,
        )  # fmt: skip

    assert one.cost is not None
    first, again, other = sample(0), sample(0), sample(1)
    one.forget_counts()
    counted = count_macs(one.pipe.transformer, lambda: sample(0, 1))
    cost = surgery.macs(one.pipe.transformer, run=one.run) if one.measured else one.cost  # of these very samples
    flags = []
    # the counter leaves matrix-vector products out, so routers may be missing in what it counts
    if counted > cost.total * (1 + TOLERANCE):
        flags.append(f"{UNDER}: {cost.total / cost.dense:.3f} of dense said, {_fraction(counted, one)} counted")
    elif counted < (cost.total - cost.planning) * (1 - TOLERANCE):
        flags.append(f"{OVER}: {cost.total / cost.dense:.3f} of dense said, {_fraction(counted, one)} counted")
    if (again - first).abs().max() > _REPEATS:
        flags.append(f"{NOT_REPRODUCIBLE}: one seed sampled twice differs by {(again - first).abs().max():.3g}")
    if (other - first).abs().max() <= _EQUAL:
        flags.append(f"{IGNORES_SEED}: two seeds give the same pictures")
    if one.budget < 1 and dense is not None and torch.equal(first, dense):
        flags.append(IDLE)
    return tuple(flags), first


def is_idle(one: Contender) -> bool:
    """Whether the arm was found to give the dense model's pictures at a budget below 1."""
    return any(flag.startswith(IDLE) for flag in one.flags)


def _fraction(counted: int, one: Contender) -> str:
    assert one.cost is not None
    return f"{counted / one.cost.dense:.3f}"
