"""What is attached to a transformer: methods, the open run, and where in it a forward stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffratio.backbones import Backbone
from diffratio.cost.run import Halves, SamplingRun, StepContext
from diffratio.errors import DiffratioError
from diffratio.methods.actions import Reuse, Skip, StepAction
from diffratio.methods.base import Method
from diffratio.surgery.memory import StepMemory
from diffratio.surgery.swap import STATE
from diffratio.tokens.grid import TokenGrid

ATTENTION = "attention"  # in what was prepared: the processors that ours stand for
BATCHED: tuple[Halves, ...] = ("cond_first", "uncond_first")


class Attachment:
    """What a converted transformer, its blocks and its sites share.

    Args:
        backbone: the family.
        methods: attached methods, outermost first.
        prepared: what the backbone switched off.
        seed: seed of the methods' draws.

    Attributes:
        halves: how batches hold the guidance halves; None where nobody has said so.
        action: what the present step does instead of a full forward.
        provisional: whether the open run's token grid is a guess, which the run's first forward replaces.
    """

    def __init__(self, backbone: Backbone, methods: list[Method], prepared: dict[str, Any], seed: int) -> None:
        self.backbone, self.prepared, self.seed = backbone, prepared, seed
        self.methods: list[Method] = []
        self.run: SamplingRun | None = None
        self.step = 0
        self.provisional = False
        self.context: StepContext | None = None
        self.action: StepAction | None = None
        self.halves: Halves | None = None
        self.memory = StepMemory()
        self.compile_options: dict[str, Any] | None = None
        self.added: tuple[str, ...] = ()  # names of the modules that methods registered on the transformer
        self.add(methods)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_attachment, (self.backbone.name,), {k: v for k, v in vars(self).items() if k != "backbone"}

    def add(self, methods: list[Method]) -> None:
        """Puts methods in front: step-level ones outside, and of those first the ones that place the steps anew."""
        self.methods = sorted(
            [*methods, *self.methods],
            key=lambda method: (method.token_level, type(method).adapt is Method.adapt),
        )

    @property
    def watching(self) -> list[Method]:
        """The methods that are told what is really computed."""
        return [method for method in self.methods if not method.static]

    def attach(self, transformer: nn.Module) -> None:
        """Lets methods put in what is not ours, innermost first."""
        for method in reversed(self.methods):
            method.attach(transformer, list(self.backbone.blocks(transformer)), self.backbone.site_modules)

    def detach(self) -> None:
        """Takes that out again."""
        for method in self.methods:
            method.detach()

    @property
    def owns_attention(self) -> bool:
        """Whether the transformer's attention processors are ours."""
        return self.prepared.get(ATTENTION) is not None

    @property
    def token_method(self) -> Method:
        """The method that decides the plans (the last one attached)."""
        return self.methods[-1]

    def adapt(self, run: SamplingRun) -> SamplingRun:
        """The run that is evaluated with all methods."""
        for method in self.methods:
            run = method.adapt(run)
        return run

    def open_run(self, run: SamplingRun, provisional: bool = False) -> None:
        """A sampling run begins: step 0, and everything that was kept is forgotten.

        Args:
            run: the run.
            provisional: a scheduler opens it, which sees no sample: the first forward says the token grid.
        """
        for method in self.methods:
            run = run.with_guided(method.guided(run))
        self.run, self.step, self.provisional = run, 0, provisional
        self.memory = StepMemory(tuple(dict.fromkeys(one for method in self.methods for one in method.skips(run))))
        for method in self.methods:
            method.begin_run(run)

    def close_run(self) -> None:
        """Forwards stand on their own again."""
        self.run, self.step, self.context, self.action = None, 0, None, None
        self.memory = StepMemory()
        for method in self.methods:
            method.end_run()

    def begin(self, transformer: nn.Module, arguments: dict[str, Any]) -> StepContext:
        """Opens one forward: where it stands, and what the methods make of the step."""
        run = None if transformer.training else self.run
        known = run.grid if run is not None and self.step > 0 and not self.provisional else None
        grid = self.backbone.grid_of(transformer, arguments, known)
        batch = arguments["hidden_states"].shape[0]
        if run is not None and self.provisional:
            if grid != run.grid:
                self.open_run(replace(run, grid=grid))
            self.provisional = False
            run = self.run
        level, levels = None, None
        if run is not None:
            self._check_open(run, grid)
            level = run.noise_levels[self.step]
        else:
            for method in self.methods:
                if method.stateful:
                    raise DiffratioError(
                        f"{method.name} keeps state from step to step and needs an open run: "
                        "diffratio.attach_(pipe) first, then sample with the pipeline"
                    )
            timestep = torch.as_tensor(arguments["timestep"])
            levels = self.backbone.noise_level(timestep).detach().reshape(-1).expand(batch)
        self.context = StepContext(
            step=self.step if run is not None else None,
            noise_level=level,
            noise_levels=levels,
            run=run,
            grid=grid,
            halves=self._halves(run, batch, transformer.training),
            training=transformer.training,
            seed=self.seed,
        )
        self._decide(self.context)
        return self.context

    def _check_open(self, run: SamplingRun, grid: TokenGrid) -> None:
        if self.step >= run.steps:
            raise DiffratioError(
                f"the open run has {run.steps} steps and a further forward was made; "
                "call scheduler.set_timesteps for a new run, or diffratio.detach_ the pipeline"
            )
        if grid != run.grid:
            raise DiffratioError(
                f"the open run is for a {run.grid.height}x{run.grid.width} token grid "
                f"and this sample has {grid.height}x{grid.width}"
            )

    def _halves(self, run: SamplingRun | None, batch: int, training: bool) -> Halves:
        """Which guidance halves the blocks will see."""
        if training:
            return "one"
        needing = next((method.name for method in self.methods if method.needs_guidance), None)
        if needing and self.backbone.guidance_order == "one" and self.halves in (None, "one"):
            raise DiffratioError(
                f"{needing} needs classifier-free guidance, and pipelines of {self.backbone.name} have none by "
                "default: their guidance scale is an input of the transformer; take a method without halves"
            )
        if needing and self.halves is None:
            raise DiffratioError(
                f"{needing} works on the guidance halves, and nothing says how this batch holds them: sample with a "
                "pipeline after diffratio.attach_(pipe), or name the order of your own loop, "
                "diffratio.attach_(pipe, halves='cond_first')"
            )
        if needing and self.halves == "one":
            raise DiffratioError(
                f"{needing} needs classifier-free guidance and this run has none: sample with guidance_scale above 1"
            )
        halves = self.halves or "one"
        if halves in BATCHED and batch % 2:
            raise DiffratioError(f"a batch of {batch} does not hold two guidance halves ({halves})")
        if run is None or run.halves_at(self.step) == run.halves:
            return halves
        if halves == "uncond":
            raise DiffratioError(
                f"step {self.step} is evaluated without guidance and the unconditional half came in a forward of its "
                "own: give both halves in one batch"
            )
        return "cond"

    def _decide(self, ctx: StepContext) -> None:
        """Asks the methods, outermost first; the first action counts, and under a reuse nobody further in is asked."""
        self.action = None
        for method in self.methods:
            action = method.begin_step(ctx)
            if self.action is None:
                self.action = action
            if isinstance(self.action, Reuse):
                return
        if isinstance(self.action, Skip) and self.action.last >= self.token_method.description.layers:
            raise DiffratioError(
                f"a step skips blocks {self.action.first} to {self.action.last} of a transformer of "
                f"{self.token_method.description.layers} blocks"
            )


def _rebuild_attachment(backbone: str) -> Attachment:
    from diffratio.backbones import get_backbone

    attachment = Attachment.__new__(Attachment)
    attachment.backbone = get_backbone(backbone)
    return attachment


def attachment(transformer: nn.Module) -> Attachment:
    """What is attached to a transformer.

    Raises:
        DiffratioError: nothing is.
    """
    state = transformer.__dict__.get(STATE)
    if state is None:
        raise DiffratioError(f"nothing is applied to {type(transformer).__name__}; diffratio.apply_ a method first")
    assert isinstance(state, Attachment)
    return state


def is_applied(transformer: nn.Module) -> bool:
    """Whether a method is attached."""
    return STATE in transformer.__dict__
