"""Analytic multiply-accumulates of a transformer, its blocks and a whole run: the reference for every budget.

Everything is per sample. Formulas: METHODS of the README's accounting section; the tests compare them with a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError, unknown

BINS = range(11)
ALL_BINS = tuple(BINS)
UNITS = ("macs", "latency", "mean_ratio")


def tokens_of_bin(bin_: int, tokens: int, alignment: int = 1) -> int:
    """Computed tokens k of N in bin j: ceil(j N / 10) in integers, rounded up to the alignment, at most N."""
    kept = (bin_ * tokens + 9) // 10
    return min(tokens, -(-kept // alignment) * alignment)


@dataclass(frozen=True)
class SiteCost:
    """MACs of one site: q per_query + k per_key + T per_text + q k per_pair, for q queries, k keys and T text tokens.

    Args:
        name: `self_attention`, `cross_attention`, `feed_forward`, or `block` for what only a plan for the whole block
            reduces.
        per_query: MACs a query token.
        per_key: MACs a key token (0 for feed_forward).
        per_pair: MACs a query-key pair.
        keys: whose tokens the keys are; at `joint` sites text tokens are queries and keys too: (q + T) (k + T) pairs.
        per_text: MACs a text token that the site computes beside the image tokens, whatever of these are reduced.
    """

    name: str
    per_query: int
    per_key: int = 0
    per_pair: int = 0
    keys: Literal["image", "text", "joint"] = "image"
    per_text: int = 0

    def macs(self, queries: int, keys: int, text: int, linear_only: bool = False) -> int:
        """MACs at the given numbers of image queries and image keys."""
        if self.keys == "text":
            keys = text
        joint = text if self.keys == "joint" else 0
        pairs = 0 if linear_only else (queries + joint) * (keys + joint)
        return queries * self.per_query + keys * self.per_key + text * self.per_text + pairs * self.per_pair


@dataclass(frozen=True)
class BlockCost:
    """One block: its sites, and what it computes once per sample (modulation, timestep embedder)."""

    sites: tuple[SiteCost, ...]
    fixed: int = 0

    def macs(self, kept: int, text: int = 0, linear_only: bool = False) -> int:
        """MACs with `kept` image tokens everywhere; 0 tokens means that the block is bypassed and costs nothing."""
        if kept == 0:
            return 0
        return self.fixed + sum(site.macs(kept, kept, text, linear_only) for site in self.sites)


@dataclass(frozen=True)
class Description:
    """A transformer, as costs see it.

    Args:
        family: backbone name.
        width: channels d of an image token.
        blocks: the blocks in order.
        per_token: MACs an image token outside the blocks (patch embedding, output projection).
        fixed: MACs a sample outside the blocks.
        per_text_token: MACs a text token outside the blocks (caption projection).
        router_inputs: numbers that a router sees of a token beside its channels.
    """

    family: str
    width: int
    blocks: tuple[BlockCost, ...]
    per_token: int
    fixed: int
    per_text_token: int = 0
    router_inputs: int = 0

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)

    def outer(self, tokens: int, text: int = 0) -> int:
        """MACs of one forward outside the blocks, at a number of image and of text tokens."""
        return self.fixed + tokens * self.per_token + text * self.per_text_token

    def dense(self, run: SamplingRun, linear_only: bool = False) -> int:
        """MACs of the whole run with every token computed everywhere, all guidance halves."""
        tokens = run.grid.tokens
        blocks = sum(block.macs(tokens, run.text_tokens, linear_only) for block in self.blocks)
        return run.forwards * (self.outer(tokens, run.text_tokens) + blocks)


@dataclass(frozen=True)
class Cost:
    """What a method costs on a run.

    Args:
        total: MACs of the whole run and all guidance halves, per sample.
        dense: the same for the dense model on the run that the budget refers to.
        per_block: MACs of each block over the run.
        planning: the part of `total` that routers, matching and scores take.
    """

    total: int
    dense: int
    per_block: tuple[int, ...]
    planning: int = 0

    @property
    def fraction(self) -> float:
        """Fraction of the dense run's MACs."""
        return self.total / self.dense


@dataclass(frozen=True)
class BlockUse:
    """How one block is used in one step.

    Args:
        tokens: image queries and image keys by site; None computes all of them; an empty use bypasses the block.
        planning: MACs of planning in this block.
        bypassed: the block is not run.
        unconditional: how the unconditional guidance half uses the block, where it differs.
        skipped: sites that are not run at all, text tokens included.
    """

    tokens: dict[str, tuple[int, int]] | None = None
    planning: int = 0
    bypassed: bool = False
    unconditional: BlockUse | None = None
    skipped: tuple[str, ...] = ()


def run_cost(
    description: Description,
    run: SamplingRun,
    use: Callable[[int, int], BlockUse],
    reference: SamplingRun | None = None,
    linear_only: bool = False,
    evaluated: Callable[[int], bool] | None = None,
) -> Cost:
    """Adds up a run, guidance halves step by step.

    Args:
        description: the transformer.
        run: the run that is evaluated.
        use: (layer, step) -> how that block is used in that step.
        reference: the run whose dense cost is the denominator (default: `run`).
        linear_only: count Linear layers only, as most papers do.
        evaluated: step -> whether anything is computed in it; a step that is not costs nothing (default: all are).
    """
    tokens, text = run.grid.tokens, run.text_tokens
    steps = [step for step in range(run.steps) if evaluated is None or evaluated(step)]

    def macs_of(block: BlockCost, one: BlockUse) -> int:
        if one.bypassed:
            return 0
        counts = one.tokens or {}
        sites = [site for site in block.sites if site.name not in one.skipped]
        macs = (site.macs(*counts.get(site.name, (tokens, tokens)), text, linear_only) for site in sites)
        return block.fixed + sum(macs)

    per_block, planning = [0] * description.layers, 0
    for layer, block in enumerate(description.blocks):
        for step in steps:
            one, halves = use(layer, step), run.halves_at(step)
            shares = [(one, halves)] if one.unconditional is None else [(one, 1), (one.unconditional, halves - 1)]
            for share, times in shares:
                planning += times * share.planning
                per_block[layer] += times * (share.planning + macs_of(block, share))
    total = sum(per_block) + sum(run.halves_at(step) for step in steps) * description.outer(tokens, text)
    return Cost(total, description.dense(reference or run, linear_only), tuple(per_block), planning)


def check_bins(bins: Any, what: str) -> tuple[int, ...]:
    """Allowed bins, as a rising tuple.

    Raises:
        DiffratioError: they are no rising integers of 0..10, or 10, the dense block, is not among them.
    """
    found = tuple(bins) if isinstance(bins, list | tuple) else ()
    whole = all(type(bin_) is int and bin_ in BINS for bin_ in found)
    if not whole or list(found) != sorted(set(found)) or BINS[-1] not in found:
        raise DiffratioError(f"{what}: allowed_bins {bins!r} must be rising integers of 0..10, 10 among them")
    return found


@dataclass(frozen=True)
class CostTable:
    """Cost of each block by bin, in any unit (MACs, or measured milliseconds), for one run.

    Args:
        cells: cost of one forward of a block at each bin, [layer][bin 0..10].
        outer: cost of one forward outside the blocks (and of whatever a method always adds).
        dense: cost of the dense forward, the denominator.
        run: the run that spreads steps over regions.
        unit: `macs`, `latency` (milliseconds) or `mean_ratio`; what is solved on the table says so.
        alignment: computed tokens at which the cells hold are rounded up to a multiple of this.
        allowed_bins: what a solved schedule may use; the others cost no less than a higher one.
    """

    cells: tuple[tuple[float, ...], ...]
    outer: float
    dense: float
    run: SamplingRun
    unit: str = "macs"
    alignment: int = 1
    allowed_bins: tuple[int, ...] = ALL_BINS

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise unknown("unit of a cost table", self.unit, UNITS)
        check_bins(self.allowed_bins, "cost table")

    @property
    def levels(self) -> tuple[int, ...]:
        """Allowed bins in which a block still computes something, rising."""
        return tuple(bin_ for bin_ in self.allowed_bins if bin_ > 0)

    def fraction(self, bins: Sequence[Sequence[int]]) -> float:
        """Fraction of the dense run of a table bins[layer][region]."""
        counts = self.run.region_forwards(len(bins[0]))
        blocks = sum(
            count * row[bin_]
            for row, layer in zip(self.cells, bins, strict=True)
            for count, bin_ in zip(counts, layer, strict=True)
        )
        return (blocks + self.run.forwards * self.outer) / (self.run.forwards * self.dense)

    def smoothed(self) -> CostTable:
        """The table between whose bins ratios are learned: cells of bins that are not allowed lie on the line between
        the allowed ones around them, since rounding sends a ratio to one of those. Costs then rise with every ratio.
        """
        levels = self.levels
        if len(levels) == len(BINS) - 1:
            return self
        return replace(self, cells=tuple(_between(row, levels) for row in self.cells))


def _between(row: Sequence[float], levels: Sequence[int]) -> tuple[float, ...]:
    """Costs of bins 1..10 on straight lines between the levels, flat below the lowest; bin 0 as it is."""

    def at(bin_: int) -> float:
        low = max((level for level in levels if level <= bin_), default=levels[0])
        high = min(level for level in levels if level >= bin_)
        share = (bin_ - low) / (high - low) if low < high and low <= bin_ else 0.0
        return row[low] + share * (row[high] - row[low])

    return (row[0], *(at(bin_) for bin_ in BINS if bin_ > 0))


def macs_table(description: Description, run: SamplingRun, alignment: int = 1, router: bool = True) -> CostTable:
    """The cost table in MACs: a routed block of k < N tokens also pays its router, N d and what else it sees."""
    tokens, text = run.grid.tokens, run.text_tokens
    ranked = tokens * (description.width + description.router_inputs)

    def cell(block: BlockCost, bin_: int) -> float:
        kept = tokens_of_bin(bin_, tokens, alignment)
        ranking = ranked if router and 0 < kept < tokens else 0
        return float(block.macs(kept, text) + ranking)

    cells = tuple(tuple(cell(block, bin_) for bin_ in BINS) for block in description.blocks)
    outer = float(description.outer(tokens, text))
    return CostTable(cells, outer, outer + sum(row[-1] for row in cells), run, alignment=alignment)


def ratio_table(layers: int, run: SamplingRun) -> CostTable:
    """The cost table whose fraction is the mean keep ratio over blocks and steps (the budget of arXiv 2412.16822)."""
    row = tuple(bin_ / BINS[-1] for bin_ in BINS)
    return CostTable((row,) * layers, 0.0, float(layers), run, "mean_ratio")
