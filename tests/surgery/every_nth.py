"""The smallest step-level method: every n-th step in full, the others reuse the output or skip blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun
from diffratio.methods import Method, MethodConfig
from diffratio.methods.actions import Reuse, Skip, StepAction
from diffratio.sampling.pipeline import PixelDiTPipeline
from diffratio.sampling.schedulers import set_steps

NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class EveryNth(MethodConfig):
    """Full at steps 0, n, 2n, ...; `blocks` is the range skipped between them, None reuses the output."""

    n: int = 2
    blocks: tuple[int, int] | None = None

    @property
    def method(self) -> type[Method]:
        return EveryNthMethod


class EveryNthMethod(Method):
    """Nothing but `action`."""

    name = "every_nth"
    config_class = EveryNth
    stateful = True
    token_level = False

    def action(self, step: int, run: SamplingRun) -> StepAction | None:
        if step % self.config.n == 0:
            return None
        return Reuse() if self.config.blocks is None else Skip(*self.config.blocks)


def dit(seed: int = 0, **changes: Any) -> Any:
    """A tiny transformer in evaluation mode."""
    torch.manual_seed(seed)
    return get_backbone("dit").tiny(**changes).eval()


def pipeline(*configs: MethodConfig, transformer: Any = None, seed: int = 0, **changes: Any) -> PixelDiTPipeline:
    """A pixel pipeline, with methods applied and attached where there are some."""
    transformer = dit(**changes) if transformer is None else transformer
    pipe = PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    if configs:
        diffratio.apply_(transformer, list(configs), seed=seed)
        diffratio.attach_(pipe)
    return pipe


def images(pipe: Any, steps: int = 6, scale: float = 2.0, noise: Tensor = NOISE, labels: Any = (1, 2)) -> Tensor:
    """Pictures (B, 1, 8, 8)."""
    return pipe(list(labels), guidance_scale=scale, latents=noise, num_inference_steps=steps, output_type="pt").images


def run_of(pipe: Any, steps: int = 6) -> SamplingRun:
    """The run that the pipeline samples."""
    from diffratio.sampling.schedulers import noise_levels

    scheduler = FlowMatchEulerDiscreteScheduler()
    set_steps(scheduler, steps)
    return SamplingRun(noise_levels(scheduler), get_backbone("dit").grid(pipe.transformer))


def counted(pipe: Any, steps: int = 6) -> int:
    """MACs of matrix products in a whole guided generation, per sample."""
    return count_macs(pipe.transformer, lambda: images(pipe, steps)) // len(NOISE)
