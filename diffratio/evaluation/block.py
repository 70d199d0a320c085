"""One block of realistic width: what routing saves in time where there is something to save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffratio import surgery
from diffratio.backbones import get_backbone
from diffratio.cost.latency import interleaved
from diffratio.cost.macs import tokens_of_bin
from diffratio.cost.run import StepContext, uniform_run
from diffratio.evaluation.metrics import efficiency
from diffratio.methods.mod import MoD
from diffratio.routing.schedule import KeepSchedule


@torch.no_grad()
def block_table(
    width: int = 1152,
    side: int = 32,
    bins: tuple[int, ...] = (8, 5, 3),
    batch: int = 1,
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times one DiT block, dense and routed, interleaved in one run.

    Args:
        width: channels d.
        side: side of the token grid; N = side^2.
        bins: keep ratios in tenths.
        batch: samples.
        repeats: interleaved repeats; medians are reported.
        device: where.

    Returns:
        A titled table with, for each keep ratio, milliseconds dense and routed, the dense block on only k tokens,
        efficiency = (1 - t / t_dense) / (1 - MACs / MACs_dense) and overhead = t / t(dense block on k tokens).
    """
    heads, tokens = width // 72, side * side
    transformer = get_backbone("dit").tiny(
        num_attention_heads=heads, attention_head_dim=width // heads, num_layers=1, sample_size=2 * side
    )
    transformer = transformer.to(device).eval()
    description = surgery.describe(transformer)
    run = uniform_run(1, get_backbone("dit").grid(transformer))
    x = torch.randn(batch, tokens, width, device=device)
    arguments: dict[str, Any] = {
        "timestep": torch.full((batch,), 500.0, device=device),
        "class_labels": torch.zeros(batch, dtype=torch.long, device=device),
    }
    context = StepContext(0, 0.5, None, run, run.grid)

    def plain(k: int) -> Callable[[], object]:
        part = x[:, :k].contiguous()
        return lambda: dense_block(part, **arguments)

    dense_block = get_backbone("dit").blocks(transformer)[0]
    timed: dict[str, Callable[[], object]] = {"dense": plain(tokens)}
    fractions = {}
    for bin_ in bins:
        routed = get_backbone("dit").tiny(
            num_attention_heads=heads, attention_head_dim=width // heads, num_layers=1, sample_size=2 * side
        )
        routed = surgery.apply_(routed.to(device).eval(), MoD(KeepSchedule(((bin_,),), run)))
        state = surgery.attachment(routed)
        state.context = context
        state.token_method.begin_step(context)
        block = get_backbone("dit").blocks(routed)[0]
        timed[f"routed {bin_}"] = lambda block=block: block(x, **arguments)  # type: ignore[misc]
        timed[f"short {bin_}"] = plain(tokens_of_bin(bin_, tokens))
        cost = description.blocks[0].macs(tokens_of_bin(bin_, tokens)) + tokens * width
        fractions[bin_] = cost / description.blocks[0].macs(tokens)
    times = interleaved(timed, repeats=repeats, warmup=1, device=device)
    dense = times["dense"].median_ms
    rows = [
        {
            "keep": bin_ / 10,
            "MACs": round(fractions[bin_], 3),
            "dense_ms": round(dense, 1),
            "routed_ms": round(times[f"routed {bin_}"].median_ms, 1),
            "dense_on_k_ms": round(times[f"short {bin_}"].median_ms, 1),
            "efficiency": round(efficiency(times[f"routed {bin_}"].median_ms, dense, fractions[bin_]), 3),
            "overhead": round(times[f"routed {bin_}"].median_ms / times[f"short {bin_}"].median_ms, 3),
        }
        for bin_ in bins
    ]
    return {"title": f"One block, d = {width}, N = {tokens}, batch {batch}, {device}", "rows": rows}
