"""`bench routing`: one block and the whole model, dense, routed, and dense on k tokens, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.bench.models import compile_blocks_, shared_copy, shortened, wide_dit
from diffratio.bench.settings import BenchSettings, RoutingSettings
from diffratio.bench.table import Row, Variant, measure
from diffratio.cost.macs import tokens_of_bin
from diffratio.cost.run import StepContext, uniform_run
from diffratio.methods.mod import MoD
from diffratio.routing.schedule import KeepSchedule, constant_table


@torch.no_grad()
def bench_routing(settings: BenchSettings, own: RoutingSettings, device: str, dtype: torch.dtype) -> list[Row]:
    """Times routing at fixed keep ratios, the same in every block.

    Args:
        settings: repeats, warm-up, seed.
        own: sizes, keep ratios, batches, modes.
        device: where.
        dtype: of weights and tokens; routers rank in float32.

    Returns:
        For each number of tokens, batch size and mode: block and model, dense; then for each keep ratio routed, and
        dense on as many tokens.
    """
    rows = []
    for tokens in own.tokens:
        for batch in own.batches:
            for mode in own.modes:
                group = f"d = {own.width}, {own.depth} blocks, N = {tokens}, batch {batch}, {mode}"
                variants = _variants(own, settings.seed, tokens, batch, mode, device, dtype)
                rows += measure(group, variants, settings, device)
    return rows


def _variants(
    own: RoutingSettings, seed: int, tokens: int, batch: int, mode: str, device: str, dtype: torch.dtype
) -> dict[str, Variant]:
    if mode == "compiled":
        torch.compiler.reset()  # graphs of other sizes would count against the compiler's limit
    transformer = wide_dit(own.width, own.depth, tokens, device, dtype, seed)
    backbone, description = backbone_of(transformer), surgery.describe(transformer)
    run = uniform_run(1, backbone.grid(transformer), "none")
    size = transformer.config.sample_size
    sample = torch.randn(batch, 4, size, size, device=device, dtype=dtype)
    x = torch.randn(batch, tokens, own.width, device=device, dtype=dtype)  # (B, N, C)
    arguments: dict[str, Any] = {
        "timestep": torch.full((batch,), 500.0, device=device),
        "class_labels": torch.zeros(batch, dtype=torch.long, device=device),
    }
    facts = {"width": own.width, "depth": own.depth, "tokens": tokens, "batch": batch, "mode": mode}

    def ready(model: Any) -> Any:
        return compile_blocks_(model) if mode == "compiled" else model

    def whole(model: Any) -> Callable[[], object]:
        return lambda: model(sample, **arguments, return_dict=False)

    def one(block: Any, kept: int = tokens) -> Callable[[], object]:
        part = x[:, :kept].contiguous()
        return lambda: block(part, **arguments)

    dense = ready(shared_copy(transformer))
    found = {
        "block, dense": Variant(one(backbone.blocks(dense)[0]), 1.0, "block, dense", facts={**facts, "part": "block"}),
        "model, dense": Variant(whole(dense), 1.0, "model, dense", facts={**facts, "part": "model"}),
    }
    for bin_ in own.bins:
        kept = tokens_of_bin(bin_, tokens)
        method = MoD(KeepSchedule(constant_table(own.depth, 1, bin_), run))
        routed = ready(surgery.apply_(shared_copy(transformer), method, seed))
        state = surgery.attachment(routed)
        state.open_run(run)  # no scheduler advances it, so every forward is its first step
        state.context = StepContext(0, run.noise_levels[0], None, run, run.grid)
        state.token_method.begin_step(state.context)
        short = shortened(transformer, kept, mode == "compiled")
        first = description.blocks[0]
        fixed = (description.outer(tokens), description.dense(run))
        macs = {
            "block": (
                (first.macs(kept) + tokens * own.width) / first.macs(tokens),
                first.macs(kept) / first.macs(tokens),
            ),
            "model": (
                surgery.macs(routed, run=run).fraction,
                (fixed[0] + sum(block.macs(kept) for block in description.blocks)) / fixed[1],
            ),
        }
        calls = {
            "block": (one(backbone.blocks(routed)[0]), one(backbone.blocks(short)[1], kept)),
            "model": (whole(routed), whole(short)),
        }
        for part in ("block", "model"):
            more = {**facts, "part": part, "keep": bin_ / 10, "kept": kept}
            names = f"{part}, routed {bin_ / 10}", f"{part}, dense on {kept}"
            reference = f"{part}, dense"
            found[names[0]] = Variant(calls[part][0], macs[part][0], reference, names[1], more)
            found[names[1]] = Variant(calls[part][1], macs[part][1], reference, facts=more)
    return found
