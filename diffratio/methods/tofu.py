"""`tofu`: token fusion (ToFu, arXiv 2312.01026): ToMe's matching, first dropping, then merging; training-free."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.cost.run import StepContext
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.base import register
from diffratio.methods.merging import check_number
from diffratio.methods.tome import ToMe, ToMeMethod
from diffratio.tokens.plan import MergePlan, NormMergePlan, Plan


@dataclass(frozen=True)
class ToFu(ToMe):
    """ToMe whose early blocks drop the sources and whose later ones merge them without shrinking their norm.

    A block that answers mixtures of tokens with mixtures of results may see means; early blocks do not.

    Args:
        ratio: fraction of the tokens removed, 0..0.75; higher removes more.
        sites: where tokens are reduced.
        metric: what is compared: `input`, the block's input, or `normed`, the site's own input.
        random: one random destination a cell, drawn anew each step; otherwise the top-left token.
        layers: blocks that reduce, by index; None is all of them.
        plan_blocks: blocks that share one matching; higher plans less, None plans once a step.
        plan_every: steps that share one matching; higher plans less and needs an attached pipeline.
        mix: plans take turns between the two whole numbers next to ratio N; otherwise all remove floor(ratio N).
        switch: fraction of the blocks (or steps), first ones, that drop, 0..1; 0 only merges, 1 only drops.
        over: what `switch` counts: `blocks` (paper), or `steps`, which needs an attached pipeline.
    """

    switch: float = 0.5
    over: str = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tofu", "switch", self.switch, 0, 1, "it is the fraction that drops")
        if self.over not in ("blocks", "steps"):
            raise unknown("tofu over", self.over, ("blocks", "steps"))


@register
class ToFuMethod(ToMeMethod):
    """ToMe's plans, turned into a drop or a norm-preserving mean by where they stand."""

    name = "tofu"
    config_class = ToFu

    def begin_step(self, ctx: StepContext) -> None:
        """As `tome`; counting steps needs a run."""
        if self.config.over == "steps" and ctx.run is None and self.config.ratio > 0:
            raise DiffratioError(
                "tofu: over='steps' counts the steps of an open run: diffratio.attach_(pipe) first, or take "
                "over='blocks'"
            )
        super().begin_step(ctx)

    def drops(self, layer: int, ctx: StepContext) -> bool:
        """Whether the sources are dropped here rather than merged."""
        if self.config.over == "blocks":
            return layer < round(self.config.switch * self.description.layers)
        assert ctx.run is not None and ctx.step is not None
        return ctx.step < round(self.config.switch * ctx.run.steps)

    def finish(self, plan: MergePlan | None, layer: int, ctx: StepContext) -> Plan | None:
        """Early: only destinations are computed and sources copy them. Late: direction of the mean, largest norm."""
        if plan is None:
            return None
        if self.drops(layer, ctx):
            return plan.dropped()
        return NormMergePlan(plan.index, plan.slots, plan.order, plan.lengths)
