"""Where tokens went: which tokens each block computed at each step of a sampling run, drawn over the pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.cost.run import StepContext
from diffratio.evaluation.pictures import draw_masks, slug
from diffratio.files import atomic_file
from diffratio.methods.base import BlockCall
from diffratio.methods.streams import Result
from diffratio.sampling.generate import generate
from diffratio.sampling.schedulers import is_flow
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.plan import Plan

COLUMNS = 5


@dataclass(frozen=True)
class TokenTrace:
    """What one sampling run computed.

    Args:
        computed: share of the dense model's block calls (both guidance halves) that computed a token, (S, B, N),
            0..1; a block that computes a token at some of its sites only counts by their share.
        predictions: predicted clean samples after each step, (S, B, C, H, W); latents where there is a VAE.
        grid: token grid of the N tokens, in raster order.
    """

    computed: Tensor
    predictions: Tensor
    grid: TokenGrid


def mask_overlays(
    pipe: Any,
    folder: str | Path,
    name: str,
    labels: Sequence[int | str] = (0, 3, 7),
    steps: int = 20,
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> list[str]:
    """Samples a few pictures and draws which of their tokens were computed, step by step.

    Args:
        pipe: a pipeline with its method attached, or a dense one.
        folder: the comparison folder.
        name: what the file is called after, `diffcr-80-s0` for instance.
        labels: class numbers, modulo the number of classes that the model knows, or prompts; one a picture.
        steps: evaluated steps.
        guidance_scale: classifier-free guidance; at 1 or below one half is evaluated.
        seed: seed of the noise.

    Returns:
        The file written (one strip: a pair of rows a picture, a column for each of five steps), relative to `folder`.

    Raises:
        DiffratioError: steps, labels or a folder that cannot be.
    """
    classes = getattr(pipe.transformer.config, "num_embeds_ada_norm", 1)
    labels = [label % classes if isinstance(label, int) else label for label in labels]
    trace = trace_tokens(pipe, labels, steps, guidance_scale, seed)
    count = len(trace.computed)
    chosen = sorted({round(i * (count - 1) / max(COLUMNS - 1, 1)) for i in range(COLUMNS)})
    pictures = torch.stack([_decode(pipe, trace.predictions[step]) for step in chosen])
    names = _class_names(pipe)
    image = draw_masks(
        pictures,
        trace.computed[chosen].unflatten(2, (trace.grid.height, trace.grid.width)),
        [f"step {step + 1} of {count}" for step in chosen],
        [names.get(label, f"class {label}") if isinstance(label, int) else label for label in labels],
    )
    path = f"images/masks-{slug(name)}.png"
    with atomic_file(Path(folder) / path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
    return [path]


def trace_tokens(
    pipe: Any, labels: Sequence[int | str], steps: int = 20, guidance_scale: float = 2.0, seed: int = 0
) -> TokenTrace:
    """Samples one picture a label and records what each block computed. Leaves the pipeline as it was.

    Args:
        pipe: a pipeline with its method attached, or a dense one.
        labels: B class numbers or prompts.
        steps: evaluated steps S.
        guidance_scale: classifier-free guidance.
        seed: seed of the noise.

    Returns:
        The trace of the run.
    """
    transformer, backbone = pipe.transformer, backbone_of(pipe.transformer)
    grid = backbone.grid(transformer)
    record = _Recorder(len(labels), grid.tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_shadowed(pipe.scheduler, "step", record.wrap_step(pipe.scheduler)))
        if surgery.is_applied(transformer):
            method = surgery.attachment(transformer).token_method
            record.sites = tuple(site.name for site in method.description.blocks[0].sites)
            stack.enter_context(_shadowed(method, "run_block", record.wrap_block(method.run_block)))
            stack.enter_context(_shadowed(method, "plan", record.wrap_plan(method.plan)))
            layers = method.description.layers
        else:
            layers = 0
        generate(
            pipe, len(labels), seed=seed, labels=list(labels), batch_size=len(labels), steps=steps,
            guidance_scale=guidance_scale, quiet=True, distributed=False,
        )  # fmt: skip
    predictions = [one if one.ndim == 4 else backbone.unpacked(one, grid) for one in record.predictions]
    return TokenTrace(record.computed(layers), torch.stack(predictions), grid)


@contextlib.contextmanager
def _shadowed(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """An instance attribute in front of a class's method, for a while."""
    owner.__dict__[name] = function
    try:
        yield
    finally:
        del owner.__dict__[name]


@dataclass
class _TracedCall(BlockCall):
    """A block call that tells which samples and tokens it was asked to compute."""

    record: Any = None
    samples: Any = None

    def __call__(self, plan: Plan | None = None, **attention: Tensor) -> Result:
        tokens = torch.arange(self.x.shape[1], device=self.x.device)[None]
        self.record.index = tokens if plan is None else plan.take(tokens)
        self.record.site_plans.clear()
        result = super().__call__(plan, **attention)
        self.record.add(self.samples)
        return result

    def select(self, samples: Tensor, hidden: bool = True) -> BlockCall:
        part = super().select(samples, hidden)
        assert isinstance(part, _TracedCall)
        return dataclasses.replace(part, samples=self.samples[samples.to(self.samples.device)])


class _Recorder:
    """Counts computed tokens step by step.

    Args:
        batch: samples B; a forward holds them once a guidance half.
        tokens: image tokens N.
    """

    def __init__(self, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.sites: tuple[str, ...] = ()
        self.index = torch.zeros(1, 0, dtype=torch.long)  # tokens of the block call in progress, (B or 1, K)
        self.site_plans: dict[str, Tensor] = {}  # of the sites inside it that reduce further
        self.present = torch.zeros(batch, tokens)
        self.rows = 0  # of the step's forwards, in block calls of one layer
        self.counts: list[Tensor] = []
        self.halves: list[float] = []
        self.predictions: list[Tensor] = []

    def wrap_step(self, scheduler: Any) -> Callable[..., Any]:
        """Closes a step, and keeps the clean sample that it predicts."""
        inner = scheduler.step

        @functools.wraps(inner)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            clean = _clean(scheduler, model_output, timestep, sample, len(self.predictions))
            self.predictions.append(clean[: self.batch].detach().float().cpu())
            self.counts.append(self.present)
            self.halves.append(self.rows / self.batch)
            self.present, self.rows = torch.zeros(self.batch, self.tokens), 0
            return inner(model_output, timestep, sample, *args, **kwargs)

        return step

    def wrap_block(self, inner: Callable[..., Result]) -> Callable[..., Result]:
        """Runs a method's own `run_block` on a call that reports."""

        def run_block(layer: int, call: BlockCall, ctx: StepContext) -> Result:
            rows = call.x.shape[0]
            if layer == 0:
                self.rows += rows
            fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(BlockCall)}
            return inner(layer, _TracedCall(**fields, record=self, samples=torch.arange(rows)), ctx)

        return run_block

    def wrap_plan(self, inner: Callable[..., Plan | None]) -> Callable[..., Plan | None]:
        """Sees the plans of sites inside a block; those of whole blocks come with their call."""

        def plan(layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
            found = inner(layer, site, x, ctx)
            if found is not None and site != "block":
                self.site_plans[site] = found.take(self.index)
            return found

        return plan

    def add(self, samples: Tensor) -> None:
        """One block call is done: its tokens count once, in equal parts over its sites."""
        for site in self.sites:
            index = self.site_plans.get(site, self.index).cpu().expand(len(samples), -1)
            ones = torch.zeros(len(samples), self.tokens).scatter_(1, index, 1 / len(self.sites))
            self.present.index_add_(0, samples % self.batch, ones)

    def computed(self, layers: int) -> Tensor:
        """Shares (S, B, N); without a method (0 layers) every token of every step."""
        counts = torch.stack(self.counts)
        return counts / (layers * max(1.0, *self.halves)) if layers else torch.ones_like(counts)


def _clean(scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor, step: int) -> Tensor:
    """The clean sample that a step's prediction points at; the sample itself where its meaning is not known."""
    prediction, kind = prediction[:, : sample.shape[1]], scheduler.config.get("prediction_type")
    if kind == "sample":
        return prediction
    if is_flow(scheduler):
        return sample - scheduler.sigmas[step].to(sample) * prediction
    if kind not in ("epsilon", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
        return sample
    signal = scheduler.alphas_cumprod[int(timestep)].to(sample)
    if kind == "epsilon":
        return (sample - (1 - signal).sqrt() * prediction) / signal.sqrt()
    return signal.sqrt() * sample - (1 - signal).sqrt() * prediction


@torch.no_grad()
def _decode(pipe: Any, samples: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] of clean samples."""
    if not hasattr(pipe, "vae"):
        return samples.clamp(-1, 1)
    vae = pipe.vae
    latents = samples.to(vae.device, vae.dtype) / vae.config.scaling_factor
    latents = latents + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(latents).sample.float().clamp(-1, 1).cpu()


def _class_names(pipe: Any) -> dict[int, str]:
    """First of the synonyms of each class."""
    named = pipe.config.get("id2label") or {}
    return {int(key): str(name).split(",")[0].strip() for key, name in named.items()}
