"""How a batch is run while keep ratios are learned: exact on both bins of every sample, or soft in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffratio.methods.base import BlockCall
from diffratio.methods.streams import Joint, Result, gated, image_of, joined_text, mixed, with_image
from diffratio.routing.router import learns, ranking
from diffratio.tokens.plan import KeepPlan, token_rows

_FLOOR = 1e-30  # of the weight inside the logarithm: float32 still holds its reciprocal, and nothing attends to it


@dataclass(frozen=True)
class Pair:
    """Computed tokens of the two bins around a sample's ratio.

    Args:
        low: tokens of the lower bin.
        high: tokens of the upper bin, at least as many.
        value_only: the upper bin alone gives the result: the ratio stands on it, and nothing asks for its derivative.
    """

    low: int
    high: int
    value_only: bool = False


@dataclass(frozen=True)
class Part:
    """The samples of a batch that share both bins, in one block.

    Args:
        call: the block on the tokens of the upper bin (b, high, C), for an exact estimator with those of the lower
            bin after them (b, high + low, C).
        pair: the numbers of tokens.
        logits: router logits of the upper tokens (b, high).
        rank: place of each upper token among its sample's best (b, high); below `low` it is also a lower token.
        weight: w of the upper bin (b,).
        nested: places of the lower tokens among the upper ones, in raster order (b, low); None where the lower bin is
            not computed on its own.
    """

    call: BlockCall
    pair: Pair
    logits: Tensor
    rank: Tensor
    weight: Tensor
    nested: Tensor | None = None


Estimate = Callable[[Part], Result]  # -> result of the upper tokens (b, high, C), and of all of the text


def in_groups(
    call: BlockCall, logits: Tensor, pairs: Sequence[Pair], weights: Tensor, estimate: Estimate, twice: bool
) -> Result:
    """Runs samples with the same two bins together; whole rows are gathered and put back once for the whole batch.

    Args:
        call: the block call of the batch, of (B, N, C).
        logits: of the router (B, N).
        pairs: of each sample.
        weights: w of each sample (B,).
        estimate: what a group gives for its upper tokens.
        twice: whether it needs the lower tokens after the upper ones.

    Returns:
        (B, N, C); tokens beyond the upper bin as they came.
    """
    x, groups = call.x, dict[Pair, list[int]]()
    for sample, pair in enumerate(pairs):
        groups.setdefault(pair, []).append(sample)
    ranked = ranking(logits)
    parts, gathered, upper_rows = [], [], []
    for pair, members in groups.items():
        samples = torch.tensor(members, device=x.device)
        plan, part = _part(call, pair, samples, logits, ranked, weights, twice and not pair.value_only)
        parts.append((plan, part))
        rows = token_rows(plan.index, x.shape[1], samples)  # (b, K)
        gathered.append(rows.flatten())
        upper_rows.append(rows[:, : pair.high].flatten())
    flat = x.flatten(0, 1)  # (B N, C)
    pieces = flat.index_select(0, torch.cat(gathered)).split([len(rows) for rows in gathered])
    results = []
    for (plan, part), piece in zip(parts, pieces, strict=True):
        tokens = piece.unflatten(0, plan.index.shape)
        results.append(estimate(replace(part, call=part.call.reduced(tokens, plan))))
    images = [image_of(result) for result in results]
    dtype = max((image.dtype for image in images), key=lambda one: one.itemsize)  # autocast may differ by group
    filled = torch.cat([image.flatten(0, 1).to(dtype) for image in images])
    image = flat.to(dtype).index_copy(0, torch.cat(upper_rows), filled).view(x.shape)
    if call.text_name is None:
        return image
    return Joint(image, joined_text(results, [sample for members in groups.values() for sample in members]))


def _part(
    call: BlockCall, pair: Pair, samples: Tensor, logits: Tensor, ranked: Tensor, weights: Tensor, twice: bool
) -> tuple[KeepPlan, Part]:
    """A group before its tokens are gathered, and the plan of all that it computes."""
    whole = len(samples) == call.x.shape[0]
    upper, rank = (ranked if whole else ranked[samples])[:, : pair.high].sort(dim=1)
    part = Part(
        call=call if whole else call.select(samples, hidden=False),
        pair=pair,
        logits=(logits if whole else logits.index_select(0, samples)).gather(1, upper),
        rank=rank,
        weight=weights if whole else weights.index_select(0, samples),
    )
    if not twice or pair.low == pair.high:
        return KeepPlan(upper), part
    nested = (rank >= pair.low).sort(dim=1, stable=True).indices[:, : pair.low]
    return KeepPlan(torch.cat([upper, upper.gather(1, nested)], dim=1)), replace(part, nested=nested)


def exact(part: Part) -> Result:
    """(1 - w) Block(x; low) + w Block(x; high) on the upper tokens, equal to one sample and one bin at a time.

    Where the attention processors are ours, both passes are one call that projects queries, keys and values of the
    shared tokens once, a quarter of a pass; elsewhere they are two calls. Text tokens pass with either set, and the
    two results are mixed with the same w; text has no gate.
    """
    call, pair, weight, nested = part.call, part.pair, part.weight, part.nested
    if nested is None:
        upper = call()
        x, lower = call.x, upper
    else:
        x, again = call.x.split([pair.high, pair.low], dim=1)
        if call.attention is not None:
            upper, lower = call.nested(nested)
        else:
            both = torch.arange(call.x.shape[1], device=x.device)[None]
            upper = call.reduced(x, KeepPlan(both[:, : pair.high]))()
            lower = call.reduced(again, KeepPlan(both[:, pair.high :]))()
        # a boundary token is untouched by the lower pass
        lower = with_image(lower, KeepPlan(nested).restore(image_of(lower), x))
    # with equally many tokens this changes nothing, but the ratios stay in the graph, as DDP needs
    mixture = upper if pair.value_only else mixed(lower, upper, weight)
    # both passes have the same gate, so it may stand around their mixture
    return gated(x, mixture, part.logits) if learns(part.logits) else mixture


def soft(part: Part) -> Result:
    """One pass on the upper tokens, of which those beyond the lower bin count w.

    Their update is scaled by w and their logits as attention keys are raised by log w, so that w = 0 is the lower bin
    and w = 1 the upper one; the ratio's gradient comes from both. In between it is an approximation: where attention is
    peaked its ratio gradient is 0.45 to 0.8 of the exact one, on the shipped 64-token model 0.9 to 1.0, with its sign.
    The text of a joint attention passes once, whole: it meets the weight in the image keys, so it is exact on bins.
    """
    call, x = part.call, part.call.x
    weight = part.weight[:, None].to(torch.promote_types(part.weight.dtype, torch.float32))  # bf16 has no 1 - 1e-3
    boundary = part.rank >= part.pair.low
    scale = torch.where(boundary, weight, torch.ones_like(weight))  # (b, high)
    if part.pair.value_only or part.pair.low == part.pair.high:
        y = call()
        scale = scale + 0 * weight  # the ratios stay in the graph, as DDP needs
    else:
        # the floor is taken from the value alone: at the lowest ratio, where w = 0, clamp would end the gradient
        floored = weight + (weight.clamp(min=_FLOOR) - weight).detach()
        y = call(key_bias=torch.where(boundary, floored.log(), torch.zeros_like(floored)))
    if learns(part.logits):
        gate = torch.sigmoid(part.logits)
        scale = scale * (1 + (gate - gate.detach()))
    image = image_of(y)
    return with_image(y, torch.lerp(x.to(image.dtype), image, scale[..., None].to(image.dtype)))


def one_sample(pair: Pair, weight: Tensor, run: Callable[[int], Result]) -> Result:
    """The exact estimate of a batch of one, a bin at a time: too simple to be wrong.

    Args:
        pair: of the sample.
        weight: w of the upper bin (1,).
        run: (number of tokens) -> the block on so many of the best tokens (1, N, C), gated.

    Returns:
        (1, N, C).
    """
    upper = run(pair.high)
    if pair.value_only:
        return upper
    lower = upper if pair.low == pair.high else run(pair.low)
    return mixed(lower, upper, weight)
