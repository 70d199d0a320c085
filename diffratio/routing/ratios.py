"""Differentiable keep ratios: one number a layer and region, kept on a compute budget by projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffratio.cost.macs import CostTable
from diffratio.errors import DiffratioError

LOWEST = 0.1
_SNAP = 1e-5  # in bins: nearer than this counts as being on the bin
_ROUNDING = 1e-6  # of the largest gradient; what is less is rounding


@dataclass(frozen=True)
class Bracket:
    """Two neighbouring bins around a ratio, and the weight of the upper one."""

    lower: int
    upper: int
    weight: float


def bracket(ratio: float) -> Bracket:
    """Neighbouring bins a < rho <= b, with weight w = (rho - a) / (b - a).

    On a bin the weight is exactly 1 and the derivative is the one from below, towards fewer tokens: that is where a
    budget pushes. Only the lowest ratio has nothing below, so there the weight is exactly 0 in the bracket above it.
    """
    if math.isnan(ratio):
        raise DiffratioError("a keep ratio is nan: the training diverged; lower the learning rate of the ratios")
    scaled = 10 * min(1.0, max(LOWEST, ratio))  # an optimizer step may leave the range before the projection mends it
    nearest = round(scaled)
    if abs(scaled - nearest) < _SNAP:
        return Bracket(nearest - 1, nearest, 1.0) if nearest > 1 else Bracket(1, 2, 0.0)
    lower = min(9, max(1, math.floor(scaled)))
    return Bracket(lower, lower + 1, scaled - lower)


class KeepRatios(nn.Module):
    """Keep ratios rho (layers, regions) in [0.1, 1], all 1 at the start.

    Args:
        layers: number of blocks L.
        regions: number of noise-level regions R; 1 is the layer-wise variant.
    """

    def __init__(self, layers: int, regions: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.ones(layers, regions))

    @classmethod
    def at(cls, bins: Sequence[Sequence[int]]) -> KeepRatios:
        """Ratios that start on bins [layer][region]; below 0.1 there is no ratio, so bypassed cells start at 0.1."""
        ratios = cls(len(bins), len(bins[0]))
        with torch.no_grad():
            ratios.rho.copy_((torch.tensor(bins) / 10).clamp(min=LOWEST))
        return ratios

    def table(self) -> list[list[float]]:
        """The ratios as Python numbers [layer][region]; one host synchronisation on a GPU."""
        return self.rho.detach().double().tolist()

    def weight(self, layer: int, regions: Tensor, brackets: Sequence[Bracket]) -> Tensor:
        """Interpolation weight of the upper bin for each sample.

        Args:
            layer: index of the block.
            regions: region of each sample (B,).
            brackets: bracket of each region, from the current `table`.

        Returns:
            (B,), equal to the brackets' weights in value (exactly 0 or 1 on a bin), with derivative 10 in rho.
        """
        lower = self.rho.new_tensor([float(b.lower) for b in brackets])
        exact = self.rho.new_tensor([b.weight for b in brackets])
        weight = 10 * self.rho[layer] - lower  # (R,)
        weight = weight + (exact - weight).detach()
        return weight[regions]


def interpolated(costs: Sequence[float], ratio: float) -> tuple[float, float]:
    """Cost of a ratio on a row of the cost table, linear between bins, and its derivative."""
    at = bracket(ratio)
    low, high = costs[at.lower], costs[at.upper]
    return low + at.weight * (high - low), 10 * (high - low)


def budget_of(table: Sequence[Sequence[float]], costs: CostTable) -> tuple[float, list[list[float]]]:
    """Fraction of the dense run that a table of ratios [layer][region] costs, and its gradient."""
    counts = costs.run.region_forwards(len(table[0]))
    scale = 1 / (costs.run.forwards * costs.dense)
    total, gradient = costs.run.forwards * costs.outer, []
    for row, layer in zip(costs.cells, table, strict=True):
        slopes = []
        for count, ratio in zip(counts, layer, strict=True):
            value, slope = interpolated(row, ratio)
            total += count * value
            slopes.append(count * slope * scale)
        gradient.append(slopes)
    return total * scale, gradient


class BudgetProjection:
    """Keeps ratios on a budget: no penalty to tune, no error to wait for.

    `remove_component_` takes the part of the gradient along the cost out, so that the optimizer trades tokens between
    cells; `project_` brings the ratios back onto the present target along the cost's own gradient, within [0.1, 1].

    Args:
        costs: cost table of the run. Where it leaves bins out, cost is linear between the allowed ones.
    """

    def __init__(self, costs: CostTable) -> None:
        self.costs = costs.smoothed()

    def fraction(self, ratios: KeepRatios) -> float:
        """Fraction of the dense run that the present ratios cost."""
        return budget_of(ratios.table(), self.costs)[0]

    def lowest(self, layers: int, regions: int) -> float:
        """The fraction with every ratio at its lowest."""
        return budget_of([[LOWEST] * regions] * layers, self.costs)[0]

    def remove_component_(self, ratios: KeepRatios) -> None:
        """Projects the gradient of the ratios onto the tangent of constant cost, in place.

        Cells that already stand at 1 and whose remaining gradient would push them further up take no part, otherwise
        their clamped share would leave a component along the cost in the others. Nothing is left of a lone free cell,
        and what rounding leaves of it must go too: Adam would make a whole step of it, and the same batch in other
        parts rounds otherwise.
        """
        if ratios.rho.grad is None:
            return
        rho, gradient = ratios.rho.detach(), ratios.rho.grad.double()
        normal = gradient.new_tensor(budget_of(ratios.table(), self.costs)[1])
        tangent, free = torch.zeros_like(gradient), normal > 0
        for _ in range(rho.numel()):
            active = normal * free
            tangent = (gradient - (gradient * active).sum() / (active * active).sum().clamp_min(1e-30) * active) * free
            stuck = free & (((rho >= 1) & (tangent < 0)) | ((rho <= LOWEST) & (tangent > 0)))
            if not stuck.any():
                break
            free &= ~stuck
        meant = free & (tangent.abs() > _ROUNDING * gradient.abs().max())
        ratios.rho.grad.copy_(torch.where(meant, tangent, torch.zeros_like(tangent)))

    @torch.no_grad()
    def project_(self, ratios: KeepRatios, target: float, tolerance: float = 1e-7) -> float:
        """Moves the ratios onto the target, in place.

        Args:
            ratios: the ratios.
            target: fraction of the dense run, "lower keeps fewer tokens".
            tolerance: allowed distance from the target.

        Returns:
            The fraction reached.

        Raises:
            DiffratioError: the target lies below what the lowest ratios cost.
        """
        start = ratios.rho.detach().double().clamp(LOWEST, 1)
        lowest = self.lowest(*start.shape)
        if target < lowest:
            raise DiffratioError(
                f"budget {target:g} is below {lowest:.3f}, the cost of this model with every keep ratio at {LOWEST}; "
                f"set budget.target to at least {lowest:.3f}"
            )
        normal = start.new_tensor(budget_of(start.clamp(max=1 - 1e-3).tolist(), self.costs)[1])
        # where two bins compute equally many tokens (few tokens, alignment) a cell moves by its mean slope
        mean = start.new_tensor([10 * (row[10] - row[1]) / 9 for row in self.costs.cells])[:, None]
        counts = start.new_tensor([float(count) for count in self.costs.run.region_forwards(start.shape[1])])
        normal = torch.where(normal > 0, normal, mean * counts / (self.costs.run.forwards * self.costs.dense))
        if not (normal > 0).any():
            return budget_of(start.tolist(), self.costs)[0]
        direction = normal / normal.max()
        low, high = -1.0 / float(direction[direction > 0].min()), 1.0 / float(direction[direction > 0].min())
        moved, reached = start, 0.0
        for _ in range(80):
            shift = (low + high) / 2
            moved = (start + shift * direction).clamp(LOWEST, 1)
            reached = budget_of(moved.tolist(), self.costs)[0]
            if abs(reached - target) < tolerance:
                break
            low, high = (shift, high) if reached < target else (low, shift)
        ratios.rho.copy_(moved)
        return reached
