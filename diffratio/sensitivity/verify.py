"""What a sensitivity map predicts, against what happens on held-out images: untrained schedules and random tables."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import image_channels
from diffratio.conditions import Classes, Conditions
from diffratio.cost.macs import macs_table
from diffratio.errors import DiffratioError
from diffratio.methods.measured import Measured
from diffratio.objectives import Objective
from diffratio.objectives.validation import region_losses
from diffratio.routing.schedule import KeepSchedule, Table
from diffratio.sensitivity.measure import region_batches
from diffratio.sensitivity.probe import Batch, probed
from diffratio.sensitivity.store import Sensitivity
from diffratio.surgery import apply_, remove_

_HeldOut = tuple[Tensor, Tensor, Objective, Conditions]
TABLES = 60
_BATCH = 32  # samples of a forward
_CHANGED = 0.6  # share of the cells that a random table changes
_DEPTHS = (0.7, 1.5, 3.0)  # mean fall in bins of a changed cell: mild, middling and deep tables


def verify(
    found: Sensitivity,
    transformer: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    schedules: Mapping[str, Table | None],
    tables: int = TABLES,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """Compares predicted with true errors.

    Args:
        found: the map, of this transformer.
        transformer: dense, nothing applied; it is left as it was.
        images: held out, (n, C, H, W) in the model's own space.
        labels: (n,).
        objective: what the model predicts.
        schedules: tables by name; None where one is out of reach.
        tables: random tables for the rank correlation, at least 3.
        seed: of random tables, levels and noise.
        say: takes a line of progress.
        conditions: what labels stand for; None takes them for classes.

    Returns:
        `rank_correlation` (Spearman, all regions together and each) and, by name, each schedule's MACs fraction,
        predicted and true output error and excess validation loss x 1000 with its standard error, all untrained and
        with the map's ranking of tokens.

    Raises:
        DiffratioError: fewer images than regions, or fewer than 3 tables.
    """
    if len(images) < 2 * found.model.regions:
        raise DiffratioError(
            f"verify: {len(images)} images are too few for {found.model.regions} regions; give at least "
            f"{2 * found.model.regions}"
        )
    if tables < 3:
        raise DiffratioError(f"verify: {tables} tables have no rank correlation; give at least 3")
    regions = found.model.regions
    batches = region_batches(transformer, objective, images, labels, regions, _BATCH, seed + 1, conditions)
    drawn = random_tables(found.model.layers, regions, tables, seed)
    measured = _errors(found, transformer, batches, drawn)
    predicted = torch.stack([found.model.region_errors(table) for table in drawn])
    say(f"{tables} random tables: done")
    weights = found.model.weights
    ranks = [spearman(predicted[:, region], measured[:, region]) for region in range(regions)]
    held_out = (images, labels, objective, conditions or Classes())
    rows = {
        name: None if table is None else _row(found, transformer, held_out, batches, table)
        for name, table in schedules.items()
    }
    return {
        "images": len(images),
        "ranking": found.ranking,
        "rank_correlation": {
            "tables": tables,
            "spearman": spearman(predicted @ weights, measured @ weights),
            "by_region": ranks,
        },
        "schedules": rows,
    }


def random_tables(layers: int, regions: int, count: int, seed: int) -> list[Table]:
    """Tables of different depth, most cells changed."""
    draws = random.Random(seed)

    def cell(depth: float) -> int:
        return max(0, 10 - int(draws.expovariate(1) * depth)) if draws.random() < _CHANGED else 10

    found = []
    for _ in range(count):
        depth = draws.choice(_DEPTHS)
        found.append(tuple(tuple(cell(depth) for _ in range(regions)) for _ in range(layers)))
    return found


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two rows of figures."""
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(one.double(), other.double()))


def _errors(found: Sensitivity, transformer: nn.Module, batches: list[list[Batch]], tables: Sequence[Table]) -> Tensor:
    """Mean square changes of the output (tables, R), float64."""
    result = torch.zeros(len(tables), len(batches), dtype=torch.float64)
    with probed(transformer, found.ranking, found.seed) as network:
        for region, own in enumerate(batches):
            count = sum(len(batch.inputs) for batch in own)
            for batch in own:
                dense = network.trace(batch, [10] * network.layers)
                for at, table in enumerate(tables):
                    change = network.trace(batch, [row[region] for row in table]) - dense
                    result[at, region] += len(batch.inputs) / count * float(change.double().square().mean())
    return result


def _row(
    found: Sensitivity, transformer: nn.Module, held_out: _HeldOut, batches: list[list[Batch]], table: Table
) -> dict[str, Any]:
    description = backbone_of(transformer).describe(transformer)
    outputs, losses = _outputs(transformer, batches), _losses(transformer, held_out)
    apply_(transformer, Measured(KeepSchedule(table, found.run), found.ranking), found.seed)
    try:
        changed, own = _outputs(transformer, batches), _losses(transformer, held_out)
    finally:
        remove_(transformer)
    errors = torch.stack([(a - b).double().square().mean() for a, b in zip(changed, outputs, strict=True)])
    excess = 1e3 * (own - losses).mean(1)
    return {
        "macs_fraction": macs_table(description, found.run).fraction(table),
        "predicted_error": found.error(table),
        "true_error": float(errors @ found.model.weights),
        "excess_loss_x1000": float(excess.mean()),
        "stderr": float(excess.std() / len(excess) ** 0.5),
    }


@torch.no_grad()
def _outputs(transformer: nn.Module, batches: list[list[Batch]]) -> list[Tensor]:
    """Outputs by region, learned variance left out."""
    backbone, channels = backbone_of(transformer), image_channels(transformer)

    def output(batch: Batch) -> Tensor:
        full = backbone.predict(transformer, batch.inputs, batch.timestep, batch.condition)
        return batch.weighed(full[:, :channels].float())

    with _evaluating(transformer):
        return [torch.cat([output(batch) for batch in own]) for own in batches]


def _losses(transformer: nn.Module, held_out: _HeldOut) -> Tensor:
    backbone, (images, labels, objective, conditions) = backbone_of(transformer), held_out

    def predict(inputs: Tensor, levels: Tensor, own: Tensor) -> Tensor:
        timestep = objective.timestep(backbone.timestep(levels))
        return backbone.predict(transformer, inputs, timestep, conditions.arguments(own))

    with _evaluating(transformer):
        return region_losses(predict, objective, images, labels, batch_size=64)


@contextlib.contextmanager
def _evaluating(transformer: nn.Module) -> Iterator[None]:
    was = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(was)
