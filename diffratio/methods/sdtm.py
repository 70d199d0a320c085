"""`sdtm`: structure-then-detail token merging (SDTM, arXiv 2505.11707), the merging alone; training-free."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from diffratio.cost.macs import BlockUse, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.base import Method, MethodConfig, check_budget, register
from diffratio.methods.merging import (
    Ladder,
    RunState,
    Sharing,
    check_cells,
    check_count,
    check_layers,
    check_number,
    dearest_on_ladders,
    from_middle,
    same_samples,
)
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import (
    cell_members,
    complement,
    foremost,
    merge_into,
    seeded_uniform,
    similar_partners,
    window_similarity,
)
from diffratio.tokens.plan import MergePlan, Plan

VARIANTS = ("paper", "release")
STRUCTURE_SITES = ("self_attention", "feed_forward")
PUBLISHED_SITES = ("feed_forward",)  # of detail steps
Place = tuple[int, str, int]  # block, site, and which of the block's modules at this site
_SHAPE = 2 / 3  # published deviation over published ratio


@dataclass(frozen=True)
class SDTM(MethodConfig):
    """Early steps collapse whole windows on attention and MLP, later ones merge single tokens on the MLP alone.

    The release's cached outputs are `sdtm_cached`: they make it a cache. The paper names a prompt reweighting of
    strength 2 without its formula; `prompt_weight` is our reading of it, and off.

    Args:
        ratio: mean of the removed fraction's range; higher removes more. Published: 0.3.
        deviation: half of that range: step i of S removes ratio - deviation + 2 deviation cos(pi/2 i/(S-1)), so most at
            the noisiest step; 0 removes the same everywhere. At most `ratio`; ratio + deviation at most 1 - 1/window^2.
            Published: 0.2.
        switch: steps i <= switch S are structure steps; higher collapses windows for longer. Published: 0.4.
        variant: `paper`: detail steps merge the least attended tokens; `release`: they match as ToMe does, into the
            token of each window that was unserved longest, and a window's similarity counts each token's pair with
            itself.
        structure_weight: weight of the frequency in a window's score. Above 0 windows that were merged for long are
            merged again, below 0 they are spared. Published: 0.05.
        detail_weight: the same in a token's score at detail steps of `paper`. Published: 0.05.
        window: side m of a window, from 2. Published: 2.
        random: a window's destination is drawn anew each step; otherwise it is the top-left token.
        levels: the removed fractions are rounded to so many evenly spaced ones, so that few token counts occur.
        layers: blocks that merge, by index; None is all of them.
        plan_blocks: merging blocks that share one plan; None plans once a step, 1 at every block (release).
        plan_every: steps that share one plan, as long as the counts agree; higher plans less.
        detail_sites: where detail steps merge. Published: feed_forward alone.
        mix: steps take turns between the two whole numbers next to what the schedule asks for, so that budgets are met
            finely; otherwise all are rounded down.
        prompt_weight: factor a on the attention that text keys get beside the fewer image keys of merging structure
            steps, as a bias log a on their logits; higher reads more of the prompt, 1 changes nothing. For joint
            attention (sd3, flux): in cross-attention every key is text, and an equal factor on all keys cancels.
    """

    called: ClassVar[str] = "sdtm"

    ratio: float = 0.3
    deviation: float = 0.2
    switch: float = 0.4
    variant: str = "paper"
    structure_weight: float = 0.05
    detail_weight: float = 0.05
    window: int = 2
    random: bool = True
    levels: int = 5
    layers: tuple[int, ...] | None = None
    plan_blocks: int | None = None
    plan_every: int = 1
    detail_sites: tuple[str, ...] = PUBLISHED_SITES
    mix: bool = False
    prompt_weight: float = 1.0

    def __post_init__(self) -> None:
        name = self.called
        check_count(name, "window", self.window, 2, "side of a window")
        highest = 1 - 1 / self.window**2
        kept = f"each {self.window}x{self.window} window keeps one token"
        check_number(name, "ratio", self.ratio, 0, highest, kept)
        check_number(name, "deviation", self.deviation, 0, self.ratio, "it is at most the ratio")
        if self.ratio + self.deviation > highest + 1e-9:
            raise DiffratioError(
                f"{name}: ratio {self.ratio!r} + deviation {self.deviation!r} exceeds {highest:g}: {kept}; lower one"
            )
        check_number(name, "switch", self.switch, 0, 1, "it is a fraction of the steps")
        if self.variant not in VARIANTS:
            raise unknown(f"{name} variant", self.variant, VARIANTS)
        for weight in ("structure_weight", "detail_weight"):
            check_number(name, weight, getattr(self, weight), -1e3, 1e3, "it weighs a frequency whose mean is 1")
        check_number(name, "prompt_weight", self.prompt_weight, 1e-3, 1e3, "it multiplies attention; 1 changes nothing")
        check_count(name, "levels", self.levels, 1, "removed fractions that occur")
        check_count(name, "plan_every", self.plan_every, 1, "steps that share a plan")
        if self.plan_blocks is not None:
            check_count(name, "plan_blocks", self.plan_blocks, 1, "blocks that share a plan; null for all")
        sites = self.detail_sites
        if not isinstance(sites, tuple) or not sites or not set(sites) <= set(STRUCTURE_SITES):
            raise unknown(f"{name} detail_sites", sites, STRUCTURE_SITES)

    @property
    def as_published(self) -> bool:
        """Whether detail steps leave attention alone."""
        return self.detail_sites == PUBLISHED_SITES

    def refreshes(self, step: int) -> bool:
        """Whether a step merges nothing, whatever the schedule says."""
        return False

    def structure(self, step: int, steps: int) -> bool:
        """Whether step i of S is a structure step."""
        return step <= self.switch * steps + 1e-9

    def fraction(self, step: int, steps: int) -> float:
        """Removed fraction of step i of S, rounded to the nearest level."""
        low, width = self.ratio - self.deviation, 2 * self.deviation
        if width == 0 or self.levels == 1:
            return self.ratio
        share = math.cos(math.pi / 2 * (step / (steps - 1) if steps > 1 else 0.0))
        return low + width * round(share * (self.levels - 1)) / (self.levels - 1)


@register
class SDTMMethod(Method):
    """One plan a step for all blocks and both guidance halves, made at the input of the first merging block.

    Frequency: plans since a token was last computed on its own (a destination counts as that), over the mean of the
    sample. With one plan a step these are the paper's steps, with `plan_blocks=1` the release's block calls.

    Attention received, which the paper's detail phase ranks by, would take an explicit attention map. The value-norm
    proxy stands for it: inattentiveness = 1 - |x| / mean |x| of the block's input.

    Guidance halves in one batch share a plan, from the mean of their unit vectors.
    """

    name = SDTM.called
    config_class: ClassVar[type[SDTM]] = SDTM
    hint: ClassVar[str] = "merging cannot touch what is computed per sample"
    stateful = True

    def __init__(self, config: SDTM, description: Description) -> None:
        super().__init__(config, description)
        self.layers = check_layers(self.name, config.layers, description)
        self.sharing = Sharing(self.layers, config.plan_blocks, config.plan_every)
        self.plans: dict[int, MergePlan] = {}  # by group of blocks
        self.present: MergePlan | None = None
        self.merging: tuple[str, ...] = ()  # sites that merge in this step
        self.carried: RunState[tuple[dict[int, MergePlan], Tensor]] = RunState(self.name)
        self.ages: Tensor | None = None  # plans since each token was computed on its own, (samples, N)
        self.draws: Tensor | None = None
        self.turns: dict[str, int] = {}  # modules of each site that this block has run so far: SD3.5 has two attentions
        self.indexes_attention = config.prompt_weight != 1
        if self.indexes_attention:
            _check_text_keys(self.name, config.prompt_weight, description)

    def sites(self) -> tuple[str, ...]:
        """Attention and MLP, as far as the model has them."""
        present = {site.name for block in self.description.blocks for site in block.sites}
        return tuple(site for site in STRUCTURE_SITES if site in present)

    def removed(self, grid: TokenGrid, step: int, steps: int) -> int:
        """Tokens removed in a step: whole windows at structure steps; at most what the grid's cells allow."""
        return _counts(self.config, grid, steps)[step]

    def renews(self, grid: TokenGrid, step: int, steps: int) -> bool:
        """Whether a step plans anew: by the clock, or because the phase or the count has changed."""
        if step == 0 or self.sharing.renews(self.clock(step)):
            return True
        counts = _counts(self.config, grid, steps)
        phases = [self.config.structure(i, steps) for i in (step, step - 1)]
        return counts[step] != counts[step - 1] or phases[0] != phases[1]

    def clock(self, step: int) -> int:
        """Steps since plans began to be shared."""
        return step

    def merging_sites(self, step: int, run: SamplingRun) -> tuple[str, ...]:
        """Where a step merges, by its phase."""
        if not self.removed(run.grid, step, run.steps):
            return ()
        return STRUCTURE_SITES if self.config.structure(step, run.steps) else self.config.detail_sites

    def begin_step(self, ctx: StepContext) -> None:
        """Finds the phase; takes over plans and ages from the previous step."""
        assert ctx.run is not None and ctx.step is not None
        self.plans, self.present, self.merging, self.ages = {}, None, (), None
        self.carried.begin(ctx.step)
        if self.carried.value is not None:
            plans, self.ages = self.carried.value
            if not self.renews(ctx.grid, ctx.step, ctx.run.steps):
                self.plans = dict(plans)
        self.merging = self.merging_sites(ctx.step, ctx.run)
        if self.merging:
            self.draws = seeded_uniform((ctx.grid.tokens,), ctx.seed, ctx.step) if self.config.random else None

    def end_step(self, output: Tensor, ctx: StepContext) -> None:
        """Hands plans and ages on to the next step."""
        if self.ages is not None:
            self.carried.next = (self.plans, self.ages)

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """Plans at the first block of a group; its sites, and the blocks after it, share the plan."""
        if not self.merging or layer not in self.layers:
            return None
        if site == "block":
            group = self.sharing.group(layer)
            if group not in self.plans:
                self.plans[group] = self._made(x, ctx).prepared().repeated(2 if ctx.paired else 1)
            self.present = self.plans[group]
            same_samples(self.name, self.present.slots, len(x))
            self.turns = {}
            return None
        if site not in self.merging:
            return None
        assert self.present is not None
        turn = self.turns[site] = self.turns.get(site, -1) + 1
        return self._at((layer, site, turn), self.present, ctx)

    def _at(self, place: Place, plan: MergePlan, ctx: StepContext) -> MergePlan:
        """The step's plan as one module gets it."""
        assert ctx.run is not None and ctx.step is not None
        _, site, turn = place
        weighs = self.config.prompt_weight != 1 and self.config.structure(ctx.step, ctx.run.steps)
        if not weighs or site != "self_attention" or turn:  # a second attention has no text keys
            return plan
        # softmax sees differences alone: log a more on every text key is log a less on every image key
        return replace(plan, key_bias=-math.log(self.config.prompt_weight))

    def _made(self, x: Tensor, ctx: StepContext) -> MergePlan:
        assert ctx.run is not None and ctx.step is not None
        x = x.detach().float()
        norms = torch.linalg.vector_norm(x, dim=-1)  # (B, N)
        if ctx.paired:  # either half may come first
            x = functional.normalize(x, dim=-1).unflatten(0, (2, -1)).mean(0)
            norms = norms.unflatten(0, (2, -1)).mean(0)
        ages = norms.new_zeros(norms.shape) if self.ages is None else same_samples(self.name, self.ages, len(norms))
        frequency = ages / ages.mean(dim=1, keepdim=True).clamp_min(1e-6)
        count = self.removed(ctx.grid, ctx.step, ctx.run.steps)
        if self.config.structure(ctx.step, ctx.run.steps):
            plan = self._structure(x, frequency, ctx.grid, count)
        else:
            plan = self._detail(x, norms, ages, frequency, ctx.grid, count)
        self.ages = (ages + 1).scatter(1, plan.index, 0.0)
        return plan

    def _structure(self, x: Tensor, frequency: Tensor, grid: TokenGrid, count: int) -> MergePlan:
        """The best windows collapse to one token each."""
        side = self.config.window
        members = cell_members(grid, side).to(x.device)  # (W, m^2)
        similarity = window_similarity(x, grid, side, self_pairs=self.config.variant == "release")
        scores = similarity + self.config.structure_weight * frequency[:, members].mean(-1)
        chosen = foremost(scores, count // (side**2 - 1))  # (samples, w)
        pick = self._drawn(members)[chosen]  # (samples, w), place of the destination in its window
        places = torch.arange(side**2 - 1, device=x.device)
        others = places + (places >= pick[..., None]).long()  # all places but the destination's
        inside = members[chosen]  # (samples, w, m^2)
        targets = inside.gather(-1, pick[..., None].expand_as(others))
        return merge_into(grid.tokens, inside.gather(-1, others).flatten(1), targets.flatten(1))

    def _detail(
        self, x: Tensor, norms: Tensor, ages: Tensor, frequency: Tensor, grid: TokenGrid, count: int
    ) -> MergePlan:
        """Single tokens join the most similar of the windows' destinations."""
        members = cell_members(grid, self.config.window).to(x.device)  # (W, m^2)
        if self.config.variant == "paper":
            scores = 1 - norms / norms.mean(dim=1, keepdim=True) + self.config.detail_weight * frequency
            best = scores[:, members].argmin(-1)  # the most attended token stays
        else:
            drawn = functional.one_hot(self._drawn(members), members.shape[1])
            best = (ages[:, members] + 0.5 * drawn).argmax(-1)  # ages are whole: the draw only settles ties
        destinations = members.expand(len(x), -1, -1).gather(-1, best[..., None])[..., 0].sort(dim=1).values
        sources = complement(destinations, grid.tokens)
        similarity, partner = similar_partners(x, sources, destinations)
        ranking = scores.gather(1, sources) if self.config.variant == "paper" else similarity
        merged = foremost(ranking, count)
        return merge_into(grid.tokens, sources.gather(1, merged), destinations.gather(1, partner.gather(1, merged)))

    def _drawn(self, members: Tensor) -> Tensor:
        """Place of each window's destination (W,): drawn for all samples, or the first."""
        if self.draws is None:
            return members.new_zeros(len(members))
        size = members.shape[1]
        return (self.draws.to(members.device)[members[:, 0]] * size).long().clamp_(max=size - 1)

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """k tokens at the merging sites; matching N_src N_dst d at detail steps, once for both halves.

        Window scores, like norms everywhere, are elementwise and not counted.
        """
        removed = self.removed(run.grid, step, run.steps)
        if removed == 0 or layer not in self.layers:
            return BlockUse()
        structure, tokens = self.config.structure(step, run.steps), run.grid.tokens
        merging = self.merging_sites(step, run)
        here = [site.name for site in self.description.blocks[layer].sites if site.name in merging]
        planning = 0
        if not structure and self.sharing.leads(layer) and self.renews(run.grid, step, run.steps):
            cells = check_cells(self.name, run.grid, self.config.window)
            planning = (tokens - cells) * cells * self.description.width // run.halves
        return BlockUse({site: (tokens - removed,) * 2 for site in here}, planning=planning)

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> SDTM:
        """Raises the ratio, with two thirds of it as deviation as published, then with what the windows leave for it.

        Where that is not enough, detail steps merge around attention too. Steps mix two neighbouring counts. Where that
        leaves a gap, fewer blocks merge more: the middle ones first.
        """
        budget = check_budget(budget)
        if budget == 1:
            return cls.config_class(ratio=0.0, deviation=0.0)
        check_cells(cls.name, run.grid, SDTM.window)
        config = dearest_on_ladders(cls, cls.ladders(description, run), description, run, budget, cls.hint)
        assert isinstance(config, SDTM)
        return config

    @classmethod
    def ladders(cls, description: Description, run: SamplingRun) -> Iterator[Sequence[SDTM]]:
        """Settings for budgets, in order of preference; each falls in cost."""
        for sites in (PUBLISHED_SITES, STRUCTURE_SITES):
            yield from by_layers(SDTM, description, run, sites)


def _check_text_keys(method: str, weight: float, description: Description) -> None:
    """Raises DiffratioError unless text and image tokens are keys of one attention."""
    keys = {site.keys for block in description.blocks for site in block.sites}
    if "joint" not in keys:
        found = "text keys alone in its cross-attention, where an equal weight cancels" if "text" in keys else "none"
        raise DiffratioError(
            f"{method}: prompt_weight {weight!r} weighs text keys beside image keys (sd3, flux), and "
            f"{description.family} has {found}; leave it at 1"
        )


@functools.lru_cache(maxsize=64)
def _counts(config: SDTM, grid: TokenGrid, steps: int) -> tuple[int, ...]:
    """Tokens removed in each step; what a phase has asked for so far is rounded, so that mixed steps make up for it."""
    if config.ratio == 0:
        return (0,) * steps
    cells, counts = check_cells(config.called, grid, config.window), []
    asked = {True: 0.0, False: 0.0}
    for step in range(steps):
        if config.refreshes(step):
            counts.append(0)
            continue
        structure = config.structure(step, steps)
        unit = config.window**2 - 1 if structure else 1
        amount = config.fraction(step, steps) * grid.tokens / unit
        before = asked[structure] if config.mix else 0.0
        asked[structure] = before + amount
        units = math.floor(asked[structure] + 1e-6) - math.floor(before + 1e-6)
        counts.append(unit * min(units, cells if structure else grid.tokens - cells))
    return tuple(counts)


def by_layers(
    make: Callable[..., SDTM], description: Description, run: SamplingRun, sites: tuple[str, ...], fewer: bool = True
) -> Iterator[Sequence[SDTM]]:
    """Ladders of the ratio: all blocks merge, then fewer of them, the middle ones first, which merge more for the same.

    Args:
        make: the config class, further settings bound.
        description: the transformer.
        run: the run.
        sites: where detail steps merge.
        fewer: whether there are ladders with fewer blocks.
    """
    highest, inner = 1 - 1 / SDTM.window**2, from_middle(description.layers)
    rungs = run.grid.tokens * run.steps

    def ladder(layers: tuple[int, ...] | None) -> Ladder[SDTM]:
        def config(at: int) -> SDTM:
            ratio = highest * (at + 1) / rungs
            deviation = min(_SHAPE * ratio, highest - ratio)
            return make(ratio, deviation, layers=layers, detail_sites=sites, mix=True)

        return Ladder(rungs, config)

    yield ladder(None)
    for count in range(description.layers - 1, 0, -1) if fewer else ():
        yield ladder(tuple(sorted(inner[:count])))
