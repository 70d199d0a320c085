"""The sensitivity map: Gram matrices of output changes, one cell changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffratio.cost.macs import BINS
from diffratio.routing.allocate import ErrorModel
from diffratio.routing.schedule import Table
from diffratio.sensitivity.probe import Batch, Network

_BINS = len(BINS)


def below(bin_: int, steps: Sequence[int] | None = None) -> tuple[int, ...]:
    """Candidate bins under a bin, falling: all of them, or those so many steps lower and 0."""
    if steps is None:
        return tuple(range(bin_ - 1, -1, -1))
    return tuple(sorted({max(0, bin_ - step) for step in steps} | {0} if bin_ else set(), reverse=True))


def measure_gram(
    network: Network,
    batches: Sequence[Sequence[Batch]],
    base: Table,
    weights: Sequence[float],
    steps: Sequence[int] | None = None,
    tick: Callable[[int], object] = lambda samples: None,
) -> ErrorModel:
    """Measures around a table.

    Args:
        network: what is measured.
        batches: fixed samples, [region][batch].
        base: the present table, bins[layer][region].
        weights: what a unit of error in each region counts (R).
        steps: measures only the bins so many steps below the present one, and 0; changes between them are interpolated
            linearly in the bin. None measures all.
        tick: called with the number of samples of each finished batch.

    Returns:
        The error model. Bins above the base are not measured and count as the base's own.
    """
    layers, size = len(base), len(base) * _BINS
    grams, crosses, offsets = [], [], []
    for region, part in enumerate(batches):
        column = [row[region] for row in base]
        cells = [(layer, bin_) for layer in range(layers) for bin_ in below(column[layer], steps)]
        gram = torch.zeros(len(cells), len(cells), dtype=torch.float64)
        cross, offset, count = torch.zeros(len(cells), dtype=torch.float64), 0.0, 0
        for batch in part:
            dense = network.trace(batch, [10] * layers)
            present = dense if set(column) == {10} else network.trace(batch, column)
            away = present - dense  # forgotten away from the dense table, it would cost every sign of e0
            changes = [(network.resume(layer, bin_) - present).flatten() for layer, bin_ in cells]
            deltas = torch.stack(changes).double().cpu() if changes else torch.zeros(0, present.numel()).double()
            residual = away.flatten().double().cpu()
            gram += deltas @ deltas.T
            cross += deltas @ residual
            offset += float(residual @ residual)
            count += present.numel()
            tick(len(batch.inputs))
        spread = _interpolation(column, cells)
        count = max(count, 1)
        grams.append(spread @ (gram / count) @ spread.T)
        crosses.append(spread @ (cross / count))
        offsets.append(offset / count)
    assert all(gram.shape == (size, size) for gram in grams)
    return ErrorModel(
        base,
        torch.stack(grams),
        torch.stack(crosses),
        torch.tensor(offsets, dtype=torch.float64),
        torch.tensor(list(weights), dtype=torch.float64),
    )


def _interpolation(column: Sequence[int], cells: Sequence[tuple[int, int]]) -> Tensor:
    """(11 L, measured): each bin's change from the measured ones, linear between neighbours; the base's own is 0."""
    matrix = torch.zeros(len(column) * _BINS, len(cells), dtype=torch.float64)
    for layer, own in enumerate(column):
        measured = {bin_: index for index, (cell, bin_) in enumerate(cells) if cell == layer}
        known = sorted((*measured, own))
        for bin_ in range(own):
            low, high = max(b for b in known if b <= bin_), min(b for b in known if b >= bin_)
            share = 1.0 if low == high else (high - bin_) / (high - low)
            for end, weight in ((low, share), (high, 1 - share)):
                if end != own and weight:
                    matrix[layer * _BINS + bin_, measured[end]] += weight
    return matrix


@torch.no_grad()
def true_errors(network: Network, batches: Sequence[Sequence[Batch]], table: Table) -> list[float]:
    """Mean square change of the output under a table, by region: what an error model predicts."""
    errors = []
    for region, part in enumerate(batches):
        total, count = 0.0, 0
        for batch in part:
            dense = network.trace(batch, [10] * len(table))
            changed = network.trace(batch, [row[region] for row in table])
            total += float((changed - dense).double().square().sum())
            count += dense.numel()
        errors.append(total / max(count, 1))
    return errors
