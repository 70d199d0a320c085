"""What routed methods share: whole blocks on the best tokens, from an integer table, grouped by bin in a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from diffratio.cost.macs import BlockUse, Description, tokens_of_bin
from diffratio.cost.run import SamplingRun, StepContext, region_of, regions_of
from diffratio.errors import DiffratioError
from diffratio.methods.base import BlockCall, Method, MethodConfig
from diffratio.methods.streams import Joint, Result, gated, image_of, joined, text_of, with_image
from diffratio.routing.router import TokenRouter, best, learns, ranking
from diffratio.routing.schedule import KeepSchedule, Table
from diffratio.tokens.plan import KeepPlan


@dataclass(frozen=True)
class RoutedConfig(MethodConfig):
    """A fixed keep schedule, solved for a budget, or the preset's own rule.

    Args:
        schedule: the table that is used; None leaves it to the preset.
        router_sees_mask: of an inpainting model, whether routers also see how much of each token's patch is hole.
    """

    schedule: KeepSchedule | None = None
    router_sees_mask: bool = field(default=False, kw_only=True)

    def preset(self, layers: int) -> Table:
        """bins[layer][region] where no schedule is given."""
        return ((10,),) * layers

    def table(self, layers: int) -> Table:
        """bins[layer][region] for a transformer of so many blocks.

        Raises:
            DiffratioError: the schedule was solved for another number of blocks.
        """
        if self.schedule is None:
            return self.preset(layers)
        if self.schedule.layers != layers:
            raise DiffratioError(
                f"keep schedule of {self.schedule.layers} layers does not fit a transformer of {layers} blocks; "
                "solve or load one for this model"
            )
        return self.schedule.bins


@dataclass(frozen=True)
class Regions:
    """Regions of the samples of one forward: one for all, or one each."""

    shared: int | None
    each: tuple[int, ...] = ()
    tensor: Tensor | None = None


class RoutedMethod(Method):
    """Kept tokens pass the whole block among themselves, the others leave it unchanged, bit for bit.

    Source: arXiv 2404.02258 (expert choice over depth), arXiv 2412.16822 (per layer and timestep region).
    """

    learned = True

    def __init__(self, config: RoutedConfig, description: Description) -> None:
        if config.router_sees_mask:
            description = replace(description, router_inputs=1)
        super().__init__(config, description)
        self.bins: Table = config.table(description.layers)
        self.alignment = config.schedule.alignment if config.schedule else 1
        self.sees_mask = config.router_sees_mask
        self.routers = [TokenRouter(description.width, self.sees_mask) for _ in range(description.layers)]
        self.hole_share: Tensor | None = None  # of each token's patch (B, N)
        self.regions = Regions(0)
        self.training = False
        self.kept_index: list[Tensor | None] | None = None  # set to a list to record the kept tokens of a forward

    def block_modules(self) -> list[nn.Module] | None:
        """The routers, where there are any."""
        return list(self.routers) or None

    @property
    def region_count(self) -> int:
        """Number of regions R."""
        return len(self.bins[0])

    def begin_step(self, ctx: StepContext) -> None:
        """Finds the samples' regions: plain numbers in an open run, one read of the levels otherwise."""
        self.training = ctx.training
        if self.kept_index is not None:
            self.kept_index = [None] * self.description.layers
        if ctx.noise_level is not None:
            self.regions = Regions(region_of(ctx.noise_level, self.region_count))
            return
        assert ctx.noise_levels is not None
        regions = regions_of(ctx.noise_levels, self.region_count)
        each = tuple(regions.tolist()) if self.region_count > 1 else (0,)
        self.regions = Regions(each[0] if len(set(each)) == 1 else None, each, regions)

    def see(self, sample: Tensor, ctx: StepContext) -> None:
        """Takes the share of hole of every token from the last channel, the mask."""
        if self.sees_mask:
            share = adaptive_avg_pool2d(sample[:, -1:].detach().float(), (ctx.grid.height, ctx.grid.width))
            self.hole_share = share.flatten(1)

    def logits(self, layer: int, x: Tensor, samples: Sequence[int] | None = None) -> Tensor:
        """The router's logits (B, N) of these samples of the forward's batch; None means all of them."""
        share = self.hole_share if self.sees_mask else None
        if share is not None and samples is not None:
            share = share[list(samples)]
        found = self.routers[layer](x, share)
        assert isinstance(found, Tensor)
        return found

    def keep(self, bin_: int, tokens: int) -> int:
        """Computed tokens of a bin."""
        return tokens_of_bin(bin_, tokens, self.alignment)

    def scores(self, layer: int, x: Tensor, samples: Sequence[int] | None = None) -> Tensor:
        """What tokens are ranked by, (B, N), higher is kept first.

        Args:
            layer: index of the block.
            x: its input (B, N, C).
            samples: which samples of the forward's batch these are; None means all of them.
        """
        return self.logits(layer, x, samples)

    def run_block(self, layer: int, call: BlockCall, ctx: StepContext) -> Result:
        """Samples with the same bin run together: no padding, no mask."""
        row = self.bins[layer]
        if self.regions.shared is not None:
            return self.run_bin(layer, call, row[self.regions.shared])
        bins = [row[region] for region in self.regions.each]
        members = {bin_: [sample for sample, own in enumerate(bins) if own == bin_] for bin_ in set(bins)}
        return grouped(call, bins, lambda part, bin_: self.run_bin(layer, part, bin_, members[bin_]))

    def run_bin(self, layer: int, call: BlockCall, bin_: int, samples: Sequence[int] | None = None) -> Result:
        """One bin for the whole batch, which are the given samples of the forward's batch (None: all)."""
        x = call.x
        kept = self.keep(bin_, x.shape[1])
        if kept == 0:
            return self._bypassed(layer, call, samples) if self.training and torch.is_grad_enabled() else call.entering
        learning = bool(self.routers) and torch.is_grad_enabled() and self.routers[layer].weight.requires_grad
        if kept == x.shape[1]:
            y = call()
            return gated(x, y, self.logits(layer, x, samples)) if learning else y
        scores = self.scores(layer, x, samples)
        return self.run_best(layer, call, scores, ranking(scores), kept)

    def _bypassed(self, layer: int, call: BlockCall, samples: Sequence[int] | None) -> Result:
        """The input, with the block's parameters in the training graph by a neutral term: DDP refuses absent ones."""
        x = call.x
        first = KeepPlan(torch.zeros(1, 1, dtype=torch.long, device=x.device))
        result, entering = call(first), call.entering
        neutral = 0 * image_of(result)[:, :, :1]  # (B, 1, 1): one token is run, whatever it gives counts nothing
        if self.routers:
            neutral = neutral + 0 * self.logits(layer, x, samples)[:, :1, None]
        image, text, before = x + neutral.to(x.dtype), text_of(result), text_of(entering)
        if text is None or before is None:
            return with_image(entering, image)
        return Joint(image, before + 0 * text.to(before.dtype))

    def run_best(self, layer: int, call: BlockCall, logits: Tensor, ranked: Tensor, kept: int) -> Result:
        """The block on the k best tokens, gated, on top of the untouched rest."""
        x = call.x
        learning = learns(logits)
        if kept == x.shape[1]:
            y = call()
            return gated(x, y, logits) if learning else y
        plan = KeepPlan(best(ranked, kept))
        if self.kept_index is not None:
            self.kept_index[layer] = plan.index
        y = call(plan)
        if learning:
            y = gated(plan.reduce(x), y, logits.gather(1, plan.index))
        return with_image(y, plan.restore(image_of(y), x))

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """k tokens everywhere in the block, and the router where it has something to drop."""
        tokens = run.grid.tokens
        bin_ = self.bins[layer][region_of(run.noise_levels[step], self.region_count)]
        kept = self.keep(bin_, tokens)
        if kept == 0:
            return BlockUse(bypassed=True)
        if kept == tokens:
            return BlockUse()
        counts = {site.name: (kept, kept) for site in self.description.blocks[layer].sites}
        return BlockUse(counts, planning=self.planning(tokens))

    def planning(self, tokens: int) -> int:
        """MACs of ranking so many tokens once: the router's matrix-vector product."""
        return tokens * (self.description.width + self.description.router_inputs)


Key = TypeVar("Key", bound=Hashable)


def grouped(call: BlockCall, keys: Sequence[Key], run: Callable[[BlockCall, Key], Result]) -> Result:
    """Runs samples with equal keys together and puts the results back in order.

    Args:
        call: the block call of the whole batch.
        keys: one hashable key a sample.
        run: (call of a group, key) -> result (b, N, C).
    """
    order: dict[Key, list[int]] = {}
    for sample, key in enumerate(keys):
        order.setdefault(key, []).append(sample)
    if len(order) == 1:
        return run(call, keys[0])
    device = call.x.device
    results = [run(call.select(torch.tensor(members, device=device)), key) for key, members in order.items()]
    return joined(results, [sample for members in order.values() for sample in members])
