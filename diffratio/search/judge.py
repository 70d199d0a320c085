"""What a schedule costs, and how far its images lie from the dense model's on the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffratio import surgery
from diffratio.errors import DiffratioError
from diffratio.methods.dato import DaTo, DaToMethod
from diffratio.methods.fewer_steps import FewerSteps, FewerStepsMethod
from diffratio.methods.step_schedule import StepChoice, StepSchedule
from diffratio.sampling.generate import generate
from diffratio.sampling.processes import usable_device
from diffratio.sampling.prompted import dense_run
from diffratio.search.settings import SearchSettings
from diffratio.search.timetable import KINDS, Drift, Timetable, recorded, timetables
from diffratio.tokens.matching import mixed_seed

TRACED = 8  # samples whose outputs say which steps to start from
NOISE = 0x5EA4  # keeps the search's noise apart from that of comparisons with the same seed


class Judge:
    """Samples with one pipeline, into which each schedule goes in turn and out again.

    Args:
        pipe: a dense pipeline on its device.
        settings: of the search.
    """

    def __init__(self, pipe: Any, settings: SearchSettings) -> None:
        self.pipe, self.settings = pipe, settings
        self.run = dense_run(pipe, settings.steps, settings.guidance_scale)
        self.description = surgery.describe(pipe.transformer)
        self.digest = surgery.weights_digest(pipe.transformer)
        self._dense: dict[bool, Tensor] = {}
        self._features: Any = None

    def schedule(self, choices: Sequence[StepChoice]) -> StepSchedule:
        """With the run, model and weights that it was found on."""
        actions, ratios = [one.action for one in choices], [one.ratio for one in choices]
        return StepSchedule.made_for(self.description, self.run, actions, ratios, self.digest)

    def fraction(self, config: DaTo | FewerSteps) -> float:
        """MACs of the run over the dense run's."""
        if isinstance(config, FewerSteps):
            return FewerStepsMethod(config, self.description).macs(self.run).fraction
        return DaToMethod(config, self.description).macs(self.run).fraction

    def error(self, config: DaTo | FewerSteps, held_out: bool = False) -> float:
        """Mean squared distance to the dense run's images, or of their features."""
        target = self.dense(held_out)
        distance = (self._seen(self.images(config, held_out)) - target).double().square().mean()
        return float(distance)

    def dense(self, held_out: bool) -> Tensor:
        """What the dense run gives on the same noise, or its features."""
        if held_out not in self._dense:
            self._dense[held_out] = self._seen(self.images(None, held_out))
        return self._dense[held_out]

    def images(self, config: DaTo | FewerSteps | None, held_out: bool) -> Tensor:
        """(n, C, H, W) in [-1, 1]; held-out samples are those that follow the searched ones."""
        own = self.settings
        count, start = (own.held_out_n, own.n) if held_out else (own.n, 0)
        steps = config.steps(own.steps) if isinstance(config, FewerSteps) else own.steps
        applied = isinstance(config, DaTo)
        if isinstance(config, DaTo):
            surgery.apply_(self.pipe, config, own.seed)
        try:
            if applied:
                surgery.attach_(self.pipe)
            found = generate(
                self.pipe, count, seed=mixed_seed(own.seed, NOISE), batch_size=own.batch_size, steps=steps,
                guidance_scale=own.guidance_scale, start=start, quiet=True, distributed=False,
            )  # fmt: skip
        finally:
            if applied:
                surgery.remove_(self.pipe)
        return found.nan_to_num(0.0)  # a schedule that overflows is far from the dense images, not an end of the search

    def timetables(self) -> dict[str, list[Timetable]]:
        """Computed steps from which the search starts, by what is done with the others: `reused`, `extrapolated`."""
        count = min(self.settings.n, TRACED)

        def sample() -> object:
            return generate(
                self.pipe, count, seed=mixed_seed(self.settings.seed, NOISE), batch_size=count,
                steps=self.settings.steps, guidance_scale=self.settings.guidance_scale, quiet=True, distributed=False,
            )  # fmt: skip

        trace = recorded(self.pipe.scheduler, sample)
        return {kind: timetables(Drift(trace, self.run.noise_levels, kind == "extrapolated")) for kind in KINDS}

    def _seen(self, images: Tensor) -> Tensor:
        if self.settings.error == "mse":
            return images
        if self._features is None:
            from diffratio.evaluation.features import Lite0Features

            self._features = Lite0Features(device=self.pipe.transformer.device)
        with torch.no_grad():
            found: Tensor = self._features.extract(images).float().cpu()
        return found


def load_judge(settings: SearchSettings) -> Judge:
    """Loads the weights.

    Raises:
        DiffratioError: a checkpoint that is routed, inpaints, or is missing, or prompts for one of classes.
    """
    from diffratio.backbones import backbone_of
    from diffratio.backbones.widening import inpaints
    from diffratio.checkpoint import load_pipeline

    device = usable_device(settings.device, f"device={settings.device!r}")
    pipe = load_pipeline(settings.weights, device=device, parts=settings.parts)
    if surgery.is_applied(pipe.transformer):
        raise DiffratioError(f"weights={settings.weights!r} is a routed checkpoint; search takes a dense one")
    if inpaints(pipe.transformer):
        raise DiffratioError(f"weights={settings.weights!r} inpaints, and search shows no masks; take another model")
    if settings.prompts:
        if backbone_of(pipe.transformer).condition != "text":
            raise DiffratioError(f"weights={settings.weights!r} is sampled by class, not by text: leave prompts out")
        pipe.prompts = settings.prompts
    return Judge(pipe, settings)


def parts_of(config: DaTo) -> tuple[DaTo, DaTo]:
    """The same schedule without its pruning, and with its pruning alone."""
    return replace(config, mode="cache"), replace(config, mode="prune")
