"""From a dense transformer and a few images to a map, its path, and calibrated methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import inpaints
from diffratio.conditions import Classes, Conditions
from diffratio.cost.macs import macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.base import MethodConfig, check_budget
from diffratio.methods.block_drop import BlockDropMethod
from diffratio.methods.fixed import TRAINING_FREE, ranking_costs
from diffratio.methods.measured import Measured
from diffratio.objectives import Objective, get_objective
from diffratio.routing.allocate import ErrorModel, walk
from diffratio.routing.schedule import Table, constant_table
from diffratio.sensitivity.gram import measure_gram
from diffratio.sensitivity.importance import region_weights
from diffratio.sensitivity.probe import Batch, probed
from diffratio.sensitivity.store import Sensitivity
from diffratio.surgery import weights_digest
from diffratio.tokens.matching import mixed_seed

NEAR = (1, 2, 4)  # bins below the present one that are measured on the way down
CALIBRATED = ("block_drop", "measured")  # methods that a map solves, without training


@dataclass(frozen=True)
class MeasureSettings:
    """How a map is measured.

    Args:
        n: images, shared out over the regions; more is more exact and takes as much longer.
        regions: noise-level regions R.
        lowest: budget at which the path ends; lower takes more stages.
        step: fall of the budget from stage to stage.
        samples: images of the short sampling runs that weigh the regions by their effect on the final image; 0 weighs
            them alike. On fashion-dit at 0.8 both gave final images as near to the dense ones (MSE 0.035), and equal
            weights about half the excess validation loss, so they are the default.
        guidance_scale: of those runs.
        ranking: training-free ranking of the tokens.
        batch_size: samples of a forward.
        seed: of levels, noise and random rankings.
    """

    n: int = 256
    regions: int = 4
    lowest: float = 0.5
    step: float = 0.075
    samples: int = 0
    guidance_scale: float = 2.0
    ranking: str = "strided"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("regions", 1), ("samples", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DiffratioError(f"measure: {name} {value!r} must be an integer of at least {least}")
        if self.n < self.regions:
            raise DiffratioError(f"measure: n={self.n} leaves a region of {self.regions} without an image")
        if self.ranking not in TRAINING_FREE:
            raise unknown("training-free ranking", self.ranking, TRAINING_FREE)
        if not 0 < self.step < 1:
            raise DiffratioError(f"measure: step {self.step!r} is outside (0, 1)")
        check_budget(self.lowest)

    def targets(self) -> tuple[float, ...]:
        """Falling budgets of the stages, down to the lowest."""
        count = max(1, round((1 - self.lowest) / self.step)) if self.lowest < 1 else 0
        return tuple(1 - (1 - self.lowest) * (stage + 1) / count for stage in range(count))


def region_batches(
    transformer: nn.Module,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    regions: int,
    batch_size: int,
    seed: int,
    conditions: Conditions | None = None,
) -> list[list[Batch]]:
    """Fixed noised samples [region][batch]: image i belongs to region i mod R, levels fill the region evenly.

    Raises:
        DiffratioError: an inpainting model, whose masks a map does not hold.
    """
    if inpaints(transformer):
        raise DiffratioError(
            "sensitivity maps are measured on models that see the noised picture alone, and this one inpaints; measure "
            "the model that it was made from"
        )
    backbone, device = backbone_of(transformer), next(transformer.parameters()).device
    conditions = conditions or Classes()
    found = []
    for region in range(regions):
        clean, own = images[region::regions], labels[region::regions]
        levels = (region + (torch.arange(len(clean)) + 0.5) / len(clean)) / regions
        generator = torch.Generator().manual_seed(mixed_seed(seed, 0x5E45, region))
        noise = torch.randn(clean.shape, generator=generator)
        # levels in mixed order, so that no batch holds neighbouring ones only
        levels = levels[torch.randperm(len(clean), generator=generator)]
        noised = objective.noised(clean, noise, levels)
        timestep = objective.timestep(backbone.timestep(levels))
        found.append(
            [
                Batch(
                    noised.inputs[start : start + batch_size].to(device),
                    timestep[start : start + batch_size].to(device),
                    conditions.arguments(own[start : start + batch_size].to(device)),
                    objective.error_weights(levels[start : start + batch_size]).to(device),
                )
                for start in range(0, len(clean), batch_size)
            ]
        )
    return found


def measure_sensitivity(
    transformer: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    run: SamplingRun,
    settings: MeasureSettings | None = None,
    say: Callable[[str], object] = lambda line: None,
    conditions: Conditions | None = None,
) -> Sensitivity:
    """Measures a dense transformer and walks the budget down.

    Args:
        transformer: dense, nothing applied; it is left as it was.
        images: (n, C, H, W) in the model's own space; training images, so that held-out ones stay unseen.
        labels: (n,).
        objective: what the model predicts.
        run: the run whose steps budgets count.
        settings: how; `n` is that of the images.
        say: called with a line after each stage.
        conditions: what labels stand for; None takes them for classes.

    Returns:
        The map, its path, and what they were measured on.

    Raises:
        DiffratioError: something is applied to the transformer.
    """
    settings = settings or MeasureSettings()
    backbone = backbone_of(transformer)
    description = backbone.describe(transformer)
    costs = macs_table(description, run)
    batches = region_batches(
        transformer, objective, images, labels, settings.regions, settings.batch_size, settings.seed, conditions
    )
    weights = region_weights(
        transformer,
        objective,
        run,
        batches,
        settings.ranking,
        settings.samples,
        settings.guidance_scale,
        settings.seed,
        conditions,
    )
    say("weights of the regions, cleanest first: " + ", ".join(f"{weight:.3g}" for weight in weights))
    with probed(transformer, settings.ranking, settings.seed) as network:

        def measure(table: Table) -> ErrorModel:
            model = measure_gram(network, batches, table, weights, NEAR)
            say(f"budget {costs.fraction(table):.3f}: error {model.error(table):.3g}")
            return model

        first = measure_gram(network, batches, constant_table(description.layers, settings.regions), weights)
        say("map around the dense model: done")
        path = walk(measure, first, costs, settings.targets())
    digest = weights_digest(transformer)
    return Sensitivity(first, path, run, digest, settings.ranking, len(images), settings.seed)


def calibrate(
    method: str,
    transformer: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    budget: float,
    *,
    objective: str = "flow",
    steps: int = 20,
    guidance: bool = True,
    run: SamplingRun | None = None,
    settings: MeasureSettings | None = None,
    conditions: Conditions | None = None,
) -> MethodConfig:
    """Solves a method that needs data for a budget.

    Args:
        method: `measured` (a schedule of least predicted output error) or `block_drop` (blocks of least change).
        transformer: dense, nothing applied; it is left as it was.
        batches: pairs of images (B, C, H, W) in the model's own space and labels (B,); all of them are used.
        budget: fraction of the run's dense MACs; lower keeps fewer tokens.
        objective: what the model predicts, `flow`, `flow_sample` or `noise`.
        steps: shorthand for the backbone's default run of so many steps.
        guidance: whether that run has both guidance halves.
        run: the run itself, instead of the two above.
        settings: how it is measured.
        conditions: what labels stand for; None takes them for classes.

    Returns:
        A config that costs within [budget - 0.01, budget].

    Raises:
        BudgetUnreachable: with the reachable range.
        DiffratioError: another method, or something is applied to the transformer.
    """
    if method not in CALIBRATED:
        raise unknown("method that is calibrated on data", method, CALIBRATED)
    check_budget(budget)
    pairs: Sequence[tuple[Tensor, Tensor]] = list(batches)
    if not pairs:
        raise DiffratioError("calibrate: no batches; give at least one pair of images and labels")
    images, labels = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    run = run or backbone_of(transformer).default_run(transformer, steps, "cfg" if guidance else "none")
    chosen = settings or MeasureSettings(
        n=max(len(images), 4), lowest=min(budget, 0.9) if method == "measured" else 1.0
    )
    found = measure_sensitivity(
        transformer, images, labels, get_objective(objective), run, chosen, conditions=conditions
    )
    return solved(method, found, transformer, budget)


def solved(method: str, found: Sensitivity, transformer: nn.Module, budget: float) -> MethodConfig:
    """The config of `measured` or `block_drop` that a map gives for a budget."""
    description = backbone_of(transformer).describe(transformer)
    if method == "block_drop":
        return BlockDropMethod.for_budget(description, found.run, budget, found.block_order())
    return Measured(found.schedule(description, budget, ranking_costs(found.ranking)), found.ranking)
