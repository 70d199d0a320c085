"""`bench table`: milliseconds of every kind of block at every bin, and of what stands around the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.bench.models import shared_copy
from diffratio.bench.settings import BenchSettings, TableSettings
from diffratio.bench.table import Row, Variant, measure
from diffratio.cost.latency import device_name
from diffratio.cost.macs import BINS, BlockCost, tokens_of_bin
from diffratio.cost.run import SamplingRun
from diffratio.cost.table import LatencyTable
from diffratio.errors import DiffratioError
from diffratio.methods.mod import MoD
from diffratio.routing.schedule import KeepSchedule, constant_table

DENSE, HALF, BYPASSED = "forward, dense", "forward, every block at 0.5", "forward, every block bypassed"


@torch.no_grad()
def bench_table(
    settings: BenchSettings, own: TableSettings, device: str, dtype: torch.dtype
) -> tuple[list[Row], LatencyTable]:
    """Times the blocks of each shape at every bin, and whole forwards, all in one interleaved loop.

    Blocks are called with what enters them in a forward, and routed as they run in one: by a learned router, which
    ranks, gathers and scatters. Those of one shape are called in turn and share the mean: one block alone, called
    again and again, finds its weights in the cache and comes out too fast. What stands outside the blocks is a forward
    with every block bypassed, less what bypassing takes. Each figure is the median over repeats of its quotient with
    the dense forward of the same repeat, times the median of that: drift of the machine cancels.

    Args:
        settings: repeats, warm-up, seed.
        own: the model, batch, alignment.
        device: where.
        dtype: of weights and tokens; routers rank in float32.

    Returns:
        The rows that were measured, and the table.

    Raises:
        DiffratioError: no such checkpoint or experiment, or a routed one.
    """
    transformer = _model(own, device, dtype)
    backbone, description = backbone_of(transformer), surgery.describe(transformer)
    run = backbone.default_run(transformer, 1, "none")
    tokens, layers = run.grid.tokens, description.layers
    shapes = _shapes(backbone.blocks(transformer), description.blocks)
    members = [[layer for layer, own in enumerate(shapes) if own == shape] for shape in range(max(shapes) + 1)]
    kept = [tokens_of_bin(bin_, tokens, own.alignment) for bin_ in BINS]
    variants: dict[str, Variant] = {}
    blocks_at = _block_calls(transformer, run, own, settings.seed)
    for shape, layers_of in enumerate(members):
        cost = description.blocks[layers_of[0]]
        for k in sorted(set(kept), reverse=True):  # bins of equal k are one function: timed once
            ranking = tokens * description.width if 0 < k < tokens else 0
            facts = {"blocks": len(layers_of), "kept": k, "batch": own.batch}
            macs = (cost.macs(k, run.text_tokens) + ranking) / cost.macs(tokens, run.text_tokens)
            call, dense_name = blocks_at(layers_of, kept.index(k)), _name(members, shape, tokens)
            variants[_name(members, shape, k)] = Variant(call, macs, dense_name, facts=facts)
    outer, dense = description.outer(tokens, run.text_tokens), description.dense(run)
    routed = _routed(transformer, run, own, settings.seed)
    for name, bin_, model in ((DENSE, 10, transformer), (HALF, 5, routed), (BYPASSED, 0, routed)):
        blocks = sum(one.macs(kept[bin_], run.text_tokens) for one in description.blocks)
        variants[name] = Variant(
            _forward(model, run, own, bin_, settings.seed), (outer + blocks) / dense, DENSE, facts={"batch": own.batch}
        )
    model = own.experiment or own.weights
    group = (
        f"{model}, {layers} blocks, d = {description.width}, N = {tokens}, batch {own.batch}, alignment {own.alignment}"
    )
    rows = measure(group, variants, settings, device)
    times = _milliseconds(rows)
    block_ms = tuple(
        tuple(times[_name(members, shape, k)] / len(layers_of) for k in kept) for shape, layers_of in enumerate(members)
    )
    table = LatencyTable(
        family=backbone.name,
        model=type(transformer).__name__,
        width=description.width,
        grid=run.grid,
        text_tokens=run.text_tokens,
        batch=own.batch,
        alignment=own.alignment,
        shapes=shapes,
        block_ms=block_ms,
        outer_ms=max(0.0, times[BYPASSED] - sum(block_ms[shape][0] for shape in shapes)),
        dtype=str(dtype).removeprefix("torch."),
        device=device_name(device),
        threads=torch.get_num_threads(),
        repeats=settings.repeats,
        warmup=settings.warmup,
        forward_ms={"dense": times[DENSE], "half": times[HALF], "bypassed": times[BYPASSED]},
    )
    return rows, table


def table_notes(table: LatencyTable) -> list[str]:
    """What the table says, and how well its parts add up to whole forwards."""
    rows = [table.block_ms[shape] for shape in table.shapes]
    lines = []
    for name, bin_ in (("dense", 10), ("half", 5)):
        added, whole = table.outer_ms + sum(row[bin_] for row in rows), table.forward_ms[name]
        lines.append(f"A {name} forward: {added:.2f} ms added up from its parts, {whole:.2f} ms measured as a whole.")
    bins = ", ".join(str(bin_) for bin_ in table.allowed_bins)
    return [
        f"{table.layers} blocks, {len(table.block_ms)} different; equal ones are called in turn and share their mean.",
        *lines,
        f"Bins that pay: {bins}. The others cost no less than a higher one and are left out of what is solved on it.",
    ]


def _model(own: TableSettings, device: str, dtype: torch.dtype) -> Any:
    """The dense transformer; its weights do not matter for its speed, so an experiment's may be random."""
    from diffratio.checkpoint import load_transformer

    if own.experiment is None:
        transformer: Any = load_transformer(own.weights, dtype, device)
        if surgery.is_applied(transformer):
            raise DiffratioError(f"weights={own.weights!r} is a routed checkpoint; give the dense one it was made from")
        return transformer
    from diffratio.training.build import build_transformer
    from diffratio.training.run import compose, plain_config

    cfg = plain_config(compose("train", [f"experiment={own.experiment}", *own.overrides]))
    transformer = build_transformer(cfg)
    return transformer.to(device, dtype).eval()


def _shapes(blocks: nn.ModuleList, costs: tuple[BlockCost, ...]) -> tuple[int, ...]:
    """For each block the number of its shape: what it computes, and the sizes of its weights."""
    seen: dict[Any, int] = {}
    pairs = zip(blocks, costs, strict=True)
    keys = [(type(block), cost, tuple(parameter.shape for parameter in block.parameters())) for block, cost in pairs]
    return tuple(seen.setdefault(key, len(seen)) for key in keys)


def _name(members: list[list[int]], shape: int, kept: int) -> str:
    count = len(members[shape])
    which = f" of shape {shape}" if len(members) > 1 else ""
    return f"{count} block{'s' if count > 1 else ''}{which}, k = {kept}"


def _milliseconds(rows: list[Row]) -> dict[str, float]:
    """By variant, on the scale of the dense forward's median."""
    timings = {row.variant: row.timing for row in rows}
    dense, times = timings[DENSE], {}
    assert dense is not None
    for row in rows:
        if row.timing is None:
            raise RuntimeError(f"{row.variant} could not be timed, so there is no table ({row.note})")
        times[row.variant] = row.timing.relative_to(dense) * dense.median_ms
    return times


def _routed(transformer: Any, run: SamplingRun, own: TableSettings, seed: int) -> Any:
    layers = len(backbone_of(transformer).blocks(transformer))
    schedule = KeepSchedule(constant_table(layers, 1), run, alignment=own.alignment)
    return surgery.apply_(shared_copy(transformer), MoD(schedule), seed).eval()


def _forward(transformer: Any, run: SamplingRun, own: TableSettings, bin_: int, seed: int) -> Callable[[], object]:
    """A whole forward, every block at a bin."""
    call = surgery.run_call(transformer, run, own.batch, seed)
    if not surgery.is_applied(transformer):
        return call
    method: Any = surgery.attachment(transformer).token_method
    bins = constant_table(method.description.layers, 1, bin_)

    def routed() -> None:
        method.bins = bins
        call()

    return routed


def _block_calls(
    transformer: Any, run: SamplingRun, own: TableSettings, seed: int
) -> Callable[[list[int], int], Callable[[], object]]:
    """(layers, bin) -> a call of those converted blocks, each on what enters it in a forward."""
    model = _routed(transformer, run, own, seed)
    backbone, state = backbone_of(model), surgery.attachment(model)
    method: Any = state.token_method
    blocks: list[Any] = list(backbone.blocks(model))
    entering: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: entering.append((args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    example = backbone.example(model, own.batch, seed, run)
    level = torch.full((own.batch,), run.noise_levels[0], device=example["hidden_states"].device)
    state.open_run(run)  # no scheduler advances it: every call is of its first step
    model(**example, timestep=backbone.timestep(level), return_dict=False)
    for hook in hooks:
        hook.remove()

    def blocks_at(layers: list[int], bin_: int) -> Callable[[], object]:
        bins, chosen = constant_table(len(blocks), 1, bin_), [(blocks[layer], *entering[layer]) for layer in layers]

        @torch.no_grad()
        def call() -> None:
            method.bins = bins
            for block, args, kwargs in chosen:
                block(*args, **kwargs)

        return call

    return blocks_at
