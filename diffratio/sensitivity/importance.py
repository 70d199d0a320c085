"""What an error in each region counts: how far the final image moves for a unit of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import image_channels
from diffratio.conditions import Classes, Conditions
from diffratio.cost.run import SamplingRun
from diffratio.methods.measured import Measured
from diffratio.objectives import Objective
from diffratio.routing.schedule import KeepSchedule, Table
from diffratio.sampling.generate import initial_noise
from diffratio.sampling.schedulers import default_sampler, make_scheduler, model_timesteps, set_steps
from diffratio.sensitivity.gram import true_errors
from diffratio.sensitivity.probe import Batch, probed
from diffratio.surgery import apply_, remove_

PERTURBED = 8  # bin of every block in the perturbed region: visible, and still in the linear range
_STEPS = 10  # enough where each region that the run visits still has one


def region_weights(
    transformer: nn.Module,
    objective: Objective,
    run: SamplingRun,
    batches: Sequence[Sequence[Batch]],
    ranking: str,
    samples: int = 16,
    guidance_scale: float = 2.0,
    seed: int = 0,
    conditions: Conditions | None = None,
) -> tuple[float, ...]:
    """Mean square distance of final images per unit of output error in each region.

    One short dense sampling run, and one for each region in which that region alone is perturbed, from the same noise.

    Args:
        transformer: dense, nothing applied.
        objective: what the model predicts.
        run: the run that budgets count; regions without a step of it weigh 0.
        batches: fixed samples, [region][batch], on which the output error of a perturbation is measured.
        ranking: training-free ranking of the tokens.
        samples: images of each run; 0 weighs every region that has steps alike.
        guidance_scale: of the guided runs.
        seed: of the initial noise.
        conditions: what is sampled; None takes the model's classes in turn.

    Returns:
        A weight for each region (R).
    """
    regions = len(batches)
    counts = run.region_counts(regions)
    if samples == 0:
        return tuple(float(count > 0) for count in counts)
    layers = backbone_of(transformer).describe(transformer).layers
    tables = [_perturbed(layers, regions, region) for region in range(regions)]
    with probed(transformer, ranking, seed) as network:
        only = [
            true_errors(network, [part if r == region else [] for r, part in enumerate(batches)], tables[region])[
                region
            ]
            for region in range(regions)
        ]
    scale = guidance_scale if run.guidance == "cfg" else 1.0
    conditions = conditions or Classes(backbone_of(transformer).null_label(transformer))
    sampled = _Sampler(transformer, objective, min(_STEPS, run.steps), scale, samples, seed, conditions)
    if any(count and not own for count, own in zip(counts, sampled.region_counts(regions), strict=True)):
        sampled = _Sampler(transformer, objective, run.steps, scale, samples, seed, conditions)
    dense = sampled.images()
    weights = []
    for region, (table, error) in enumerate(zip(tables, only, strict=True)):
        if not counts[region] or not error:
            weights.append(0.0)
            continue
        apply_(transformer, Measured(KeepSchedule(table, run), ranking), seed=seed)
        try:
            moved = sampled.images()
        finally:
            remove_(transformer)
        weights.append(float((moved - dense).double().square().mean()) / error)
    return tuple(weights)


def _perturbed(layers: int, regions: int, region: int) -> Table:
    return tuple(tuple(PERTURBED if r == region else 10 for r in range(regions)) for _ in range(layers))


class _Sampler:
    """Deterministic sampling in the model's own space: no decoder, no clamp, so that distances stay linear."""

    def __init__(
        self,
        transformer: Any,
        objective: Objective,
        steps: int,
        guidance_scale: float,
        samples: int,
        seed: int,
        conditions: Conditions,
    ) -> None:
        self.transformer, self.scale, self.backbone = transformer, guidance_scale, backbone_of(transformer)
        self.scheduler = make_scheduler(default_sampler(objective.name), objective.name)
        self.steps = steps
        set_steps(self.scheduler, steps)
        reference, side = next(transformer.parameters()), self.backbone.sample_side(transformer)
        shape = (image_channels(transformer), side, side)
        self.noise = initial_noise(seed, range(samples), shape, device=reference.device)
        labels = torch.tensor(conditions.in_turn(samples), device=reference.device)
        if self.backbone.guidance_order == "one":  # the scale is an input, if anything
            self.scale = 1.0
        if self.scale > 1:
            assert conditions.null is not None
            labels = torch.cat([labels, torch.full_like(labels, conditions.null)])
        scale = self.backbone.scale_input(transformer, guidance_scale, samples)
        self.condition = {**conditions.arguments(labels), **scale}
        self.dtype = reference.dtype

    def region_counts(self, regions: int) -> tuple[int, ...]:
        """Steps in each region."""
        levels = self.backbone.scheduler_level(model_timesteps(self.scheduler)).clamp(0, 1)
        grid = self.backbone.grid(self.transformer)
        return SamplingRun(tuple(levels.tolist()), grid).region_counts(regions)

    @torch.no_grad()
    def images(self) -> Tensor:
        """Final images (samples, C, H, W) of the transformer as it is now."""
        was = self.transformer.training
        self.transformer.eval()
        set_steps(self.scheduler, self.steps)
        x, times = self.noise, model_timesteps(self.scheduler).to(self.noise.device)
        for step, t in enumerate(self.scheduler.timesteps):
            inputs = torch.cat([x, x]) if self.scale > 1 else x
            timestep = self.backbone.model_time(times[step]).expand(len(inputs))
            output = self.backbone.predict(self.transformer, inputs.to(self.dtype), timestep, self.condition)
            output = output[:, : x.shape[1]].float()
            if self.scale > 1:
                conditional, unconditional = output.chunk(2)
                output = unconditional + self.scale * (conditional - unconditional)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        self.transformer.train(was)
        return x
