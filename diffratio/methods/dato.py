"""`dato`: dynamics-aware token pruning with cached steps (DaTo, arXiv 2501.00375); training-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from diffratio.cost.macs import BlockUse, Description
from diffratio.cost.run import Halves, SamplingRun, StepContext
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.actions import Reuse, Skip, StepAction
from diffratio.methods.base import Method, check_budget, register
from diffratio.methods.dato_config import MODES, SCOPES
from diffratio.methods.dato_config import DaTo as DaTo
from diffratio.methods.dato_ladders import cache_ladders, ladders
from diffratio.methods.intervals import inner_blocks
from diffratio.methods.merging import RunState, dearest_on_ladders, same_samples
from diffratio.methods.predictions import token_distance
from diffratio.methods.results import numbers_of_sites, of_halves
from diffratio.methods.step_schedule import COMPUTE, CONTINUE, EXTRAPOLATE, REUSING
from diffratio.tokens.matching import seeded_normal, seeded_uniform
from diffratio.tokens.plan import AttentionPlan, KeepPlan, Plan
from diffratio.tokens.pruning import CELL, StoredPlan, all_tokens, base_tokens, prune_similar

SITE = "self_attention"  # where the plan is made: its input is the normed features of a block
Place = tuple[int, str]  # block and site


@dataclass(frozen=True)
class Seen:
    """What one step leaves to the next.

    Attributes:
        outputs: predictions of the last two computed steps, newest last, each by guidance half, conditional first.
        results: outputs of the pruned sites at full length, with the halves that they hold.
    """

    outputs: tuple[tuple[Tensor, ...], ...] = ()
    results: dict[Place, tuple[Halves, Tensor]] = field(default_factory=dict)


@register
class DaToMethod(Method):
    """One plan a computed step for all blocks but the first and last, and for both guidance halves.

    A token's change is the mean over predicted channels and pixels of |y_a - y_b|, the last two computed predictions,
    over its mean in the sample; the halves' changes are averaged, and similarity is that of the mean of their unit
    vectors. Until two predictions are known the draw alone chooses the base tokens. Cached steps prune nothing.
    """

    name = "dato"
    config_class = DaTo
    stateful = True
    variants = MODES

    def __init__(self, config: DaTo, description: Description) -> None:
        super().__init__(config, description)
        if config.schedule is not None:
            config.schedule.require(description)
        first, last = inner_blocks(description.layers)
        self.layers = range(first, last + 1)
        present = {site.name for block in description.blocks for site in block.sites}
        self.wanted = tuple(site for site in SCOPES[config.scope] if site in present)
        self.indexes_attention = config.scope == "attn_q"
        self.carried: RunState[Seen] = RunState(self.name)
        self.count, self.present = 0, False  # pruned tokens of this step, and whether this step is computed
        self.pruned: KeepPlan | None = None
        if config.fill == "cached":
            _check_single_sites(description, self.layers)

    @property
    def decides_steps(self) -> bool:
        """Not where every step is computed."""
        if self.config.schedule is not None:
            return self.config.mode != "prune" and any(one.action != COMPUTE for one in self.config.schedule.choices)
        return self.config.mode != "prune" and self.config.every > 1

    def check_beside(self, others: Sequence[Method]) -> None:
        """Another method that decides about steps is refused."""
        for other in others:
            if self.decides_steps and other.decides_steps:
                raise DiffratioError(
                    f"dato and {other.name} both decide which steps are computed; take dato with mode=prune beside it"
                )

    def sites(self) -> tuple[str, ...]:
        """Of the scope, as far as the model has them."""
        return self.wanted

    def action(self, step: int, run: SamplingRun) -> StepAction | None:
        """By the schedule, or the interval."""
        letter = self.config.choices(run.steps)[step].action
        if letter == COMPUTE:
            return None
        if letter in REUSING:
            return Reuse(letter == CONTINUE)
        first, last = self.config.skipped(self.description)
        return Skip(first, last, letter == EXTRAPOLATE)

    def removed(self, step: int, run: SamplingRun) -> int:
        """Tokens pruned in a step."""
        return self.config.removed(run.grid, run.steps)[step]

    def begin_step(self, ctx: StepContext) -> StepAction | None:
        """Takes over what earlier steps left, and says what is done with this one."""
        assert ctx.run is not None and ctx.step is not None
        self.pruned = None
        self.carried.begin(ctx.step)
        before = self.carried.value or Seen()
        self.carried.next = Seen(before.outputs, dict(before.results))
        action = self.action(ctx.step, ctx.run)
        self.present, self.count = action is None, self.removed(ctx.step, ctx.run)
        if self.count:  # here, since a compiled block cannot make a generator
            self.draws, self.sign = seeded_normal((ctx.grid.tokens,), ctx.seed, ctx.step), self._sign(ctx)
        return action

    def end_run(self) -> None:
        """Frees the results."""
        self.carried, self.pruned = RunState(self.name), None

    def stored_numbers(self, run: SamplingRun) -> int:
        """With fill `cached` one result of every pruned site; the last two predictions are small beside it."""
        if self.config.fill != "cached" or not any(self.config.removed(run.grid, run.steps)):
            return 0
        return run.halves * numbers_of_sites(self.description, self.layers, self.wanted, run.grid.tokens)

    def end_step(self, output: Tensor, ctx: StepContext) -> None:
        """Keeps the prediction of a computed step."""
        if not self.present:
            return
        value = output.detach()
        halves: tuple[Tensor, ...] = (value,)
        if ctx.paired:
            first, second = value.chunk(2)
            halves = (first, second) if ctx.halves == "cond_first" else (second, first)
        assert self.carried.next is not None
        before = self.carried.value or Seen()
        self.carried.next = Seen((*before.outputs, halves)[-2:], self.carried.next.results)

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """One plan a step, made at the first pruned block's attention, whose input is normed."""
        if site not in self.wanted or layer not in self.layers:
            return None
        cached = self.config.fill == "cached"
        if not self.count and not (cached and self._prunes(ctx)):
            return None
        if self.count and self.pruned is None:
            self.pruned = self._made(x, ctx)
        plan = self._stored((layer, site), x, ctx) if cached else self.pruned
        if self.config.scope == "attn_q" and self.pruned is not None:
            assert plan is not None
            return AttentionPlan(x.shape[1], queries=plan)
        return plan

    @property
    def _refills_from_kept(self) -> bool:
        return self.config.refill == "release" and self.config.fill == "copy"

    def _prunes(self, ctx: StepContext) -> bool:
        """Whether any step of the run prunes, so that results are worth storing."""
        assert ctx.run is not None
        return any(self.config.removed(ctx.run.grid, ctx.run.steps))

    def _stored(self, place: Place, x: Tensor, ctx: StepContext) -> StoredPlan:
        """The step's plan with the place's own stored results."""
        assert self.carried.next is not None
        results = self.carried.next.results

        def keep(result: Tensor) -> None:
            results[place] = (ctx.halves, result)

        if self.pruned is None:
            return StoredPlan(all_tokens(x.shape[1], x.device), keep=keep)
        known = (self.carried.value or Seen()).results.get(place)
        if known is None:
            raise DiffratioError(
                f"dato: {place[1]} of block {place[0]} was not computed in this run before step {ctx.step}, so nothing "
                "is stored to fill pruned tokens with; take fill=copy"
            )
        stored = same_samples(self.name, of_halves(*known, ctx.halves), len(x))
        return StoredPlan(self.pruned.index, stored=stored, keep=keep)

    def _made(self, x: Tensor, ctx: StepContext) -> KeepPlan:
        """Base tokens by score, then the tokens most similar to them."""
        assert ctx.step is not None
        metric = x.detach().float()
        if ctx.paired:  # either half may come first
            metric = functional.normalize(metric, dim=-1).unflatten(0, (2, -1)).mean(0)  # (n, N, C)
        draws = self.draws.to(x.device)
        scores = self.config.noise * draws.expand(len(metric), -1)
        change = self._change(ctx)
        if change is not None:
            scores = scores + self.sign * same_samples(self.name, change, len(metric))
        elif not self.config.noise:
            scores = draws.expand(len(metric), -1)
        plan = prune_similar(metric, base_tokens(scores, ctx.grid), self.count, self._refills_from_kept)
        if not ctx.paired:
            return plan
        assert plan.fill is not None
        return KeepPlan(plan.index.repeat(2, 1), plan.fill.repeat(2, 1))

    def _change(self, ctx: StepContext) -> Tensor | None:
        """Change of each token between the last two computed predictions over its mean, (n, N)."""
        seen = self.carried.value
        if seen is None or len(seen.outputs) < 2:
            return None
        pairs = list(zip(*seen.outputs, strict=False))  # a half that one of them lacks does not count
        apart = [
            token_distance(
                self.name, self.description, new.float(), same_samples(self.name, old, len(new)).float(), ctx.grid
            )
            for old, new in pairs
        ]
        change = torch.stack(apart).mean(0)
        return change / change.mean(dim=1, keepdim=True).clamp_min(1e-12)

    def _sign(self, ctx: StepContext) -> float:
        """w: whether base tokens are those that change most or least."""
        if self.config.polarity == "random":
            assert ctx.step is not None
            return 1.0 if seeded_uniform((1,), ctx.seed, ctx.step, 1).item() < 0.5 else -1.0
        return 1.0 if self.config.polarity == "high" else -1.0

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """N - r tokens at the pruned sites (queries alone for `attn_q`).

        Matching takes N_rest N_base d, and r (N - r) d more with refill `release`, once for both halves; the change of
        tokens is elementwise and not counted.
        """
        removed = self.removed(step, run)
        if not removed or layer not in self.layers:
            return BlockUse()
        tokens = run.grid.tokens
        kept = tokens - removed
        here = [site.name for site in self.description.blocks[layer].sites if site.name in self.wanted]
        planning = 0
        if layer == self.layers[0]:
            base = (run.grid.height // CELL) * (run.grid.width // CELL)
            pairs = (tokens - base) * base + (removed * kept if self._refills_from_kept else 0)
            planning = pairs * self.description.width // run.halves_at(step)
        keys = tokens if self.config.scope == "attn_q" else kept
        return BlockUse({site: (kept, keys) for site in here}, planning=planning)

    @classmethod
    def variant_for_budget(cls, variant: str, description: Description, run: SamplingRun, budget: float) -> DaTo:
        """`dato:cache` and `dato:prune` are its two halves, `dato:both` is `dato`."""
        return cls.for_budget(description, run, budget, mode=variant)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float, *, mode: str = "both") -> DaTo:
        """A uniform interval and a uniform ratio.

        `both`: steps are cached at even intervals until half of the saving is made, pruning makes the rest; where it
        cannot, more steps are cached. `prune` raises the ratio at attention, then at the MLP too; `cache` caches as
        many steps as needed and then runs more of the last blocks in them.

        Raises:
            BudgetUnreachable: below what one computed step and the first and last blocks of the others cost.
        """
        if mode not in MODES:
            raise unknown("dato mode", mode, MODES)
        if check_budget(budget) == 1:
            return DaTo(every=1.0, ratio=0.0, mode=mode)
        hint = "cached steps run their first and last block, and the first step is computed"
        if mode == "prune":
            hint = "pruning leaves a quarter of the tokens, and all of them in the first and last block"
        found = cache_ladders(description, run) if mode == "cache" else ladders(cls, description, run, budget, mode)
        return cast(DaTo, dearest_on_ladders(cls, found, description, run, budget, hint))


def _check_single_sites(description: Description, layers: Sequence[int]) -> None:
    for layer in layers:
        names = [site.name for site in description.blocks[layer].sites]
        if len(names) != len(set(names)):
            raise DiffratioError(
                f"dato: fill=cached keeps one result a site, and blocks of this {description.family} have a second "
                "attention; take fill=copy"
            )
