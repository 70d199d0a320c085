"""What the fixed-schedule controls share: a table of bins, and a named ranking of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.cost.macs import Description
from diffratio.cost.run import StepContext
from diffratio.errors import unknown
from diffratio.methods.routed import RoutedConfig, RoutedMethod
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import seeded_uniform

RANKINGS = ("router", "deviation", "strided", "random")
TRAINING_FREE = RANKINGS[1:]
_LEVELS = 10**6  # noise levels are told apart to one part in so many
# fractional parts of multiples of these fill a square, or a line, evenly from the first point on
_PLANE, _LINE = (0.7548776662466927, 0.5698402909980532), 0.6180339887498949


@dataclass(frozen=True)
class FixedConfig(RoutedConfig):
    """A fixed table and how tokens are ranked.

    Args:
        ranking: `router` (learned; at its initialisation it ranks at random), or training-free: `deviation` (squared
            distance from the sample's mean token, far ones are kept), `strided` (evenly spread places, others in each
            block), `random` (seeded, others in each block and at each noise level).
    """

    ranking: str = "router"

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise unknown(f"{type(self).__name__} ranking", self.ranking, RANKINGS)


class FixedMethod(RoutedMethod):
    """A routed method that never changes its table; without `ranking=router` it has no parameters of its own.

    A random ranking is a function of (seed, noise level, block): in an open run all samples and guidance halves share
    one draw a step, while training each sample has its own, whatever batch or process it is in.
    """

    def __init__(self, config: FixedConfig, description: Description) -> None:
        super().__init__(config, description)
        self.ranking = config.ranking
        self.drawn = torch.empty(0)  # (B or 1, layers, N)
        if self.ranking != "router":
            self.routers = []

    def begin_step(self, ctx: StepContext) -> None:
        """Draws what does not depend on the tokens' values."""
        super().begin_step(ctx)
        layers, tokens = self.description.layers, ctx.grid.tokens
        if self.ranking == "strided":
            self.drawn = strided(ctx.grid, layers)[None]
        elif self.ranking == "random":
            if ctx.noise_level is not None:
                levels = [ctx.noise_level]
            else:
                assert ctx.noise_levels is not None
                levels = ctx.noise_levels.tolist()
            keys = [round(level * _LEVELS) for level in levels]
            draws = {key: seeded_uniform((layers, tokens), ctx.seed, key) for key in dict.fromkeys(keys)}
            # one row where all levels agree: index and plan are then shared by the batch
            self.drawn = torch.stack([draws[key] for key in keys] if len(draws) > 1 else list(draws.values()))

    def scores(self, layer: int, x: Tensor, samples: Sequence[int] | None = None) -> Tensor:
        """By the configured ranking."""
        if self.ranking == "router":
            return super().scores(layer, x, samples)
        if self.ranking == "deviation":
            exact = x.detach().double() if x.dtype == torch.float64 else x.detach().float()
            return (exact - exact.mean(1, keepdim=True)).square().sum(-1)  # (B, N)
        drawn = self.drawn[:, layer]
        if samples is not None and len(drawn) > 1:
            drawn = drawn[list(samples)]
        return drawn.to(x.device)

    def planning(self, tokens: int) -> int:
        """Routers and distances take a product a channel; fixed and random rankings are free."""
        return super().planning(tokens) if ranking_costs(self.ranking) else 0


def ranking_costs(ranking: str) -> bool:
    """Whether a ranking computes something from every token, N d MACs a block."""
    return ranking in ("router", "deviation")


def strided(grid: TokenGrid, layers: int) -> Tensor:
    """Scores (layers, N) whose best k are spread evenly over the grid for every k, shifted from block to block."""
    rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    phase = rows.double() * _PLANE[0] + columns.double() * _PLANE[1]
    shift = torch.arange(layers, dtype=torch.float64) * _LINE
    return (phase.reshape(1, -1) + shift[:, None]) % 1.0
