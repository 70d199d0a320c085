"""What a transformer costs with the methods in it, and what they do, as text."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from diffratio.backbones import backbone_of
from diffratio.cost.macs import BlockUse, Cost, Description
from diffratio.cost.run import SamplingRun
from diffratio.cost.table import LatencyTable, load_cost_table
from diffratio.errors import DiffratioError
from diffratio.methods.actions import Reuse, Skip
from diffratio.methods.base import (
    Method,
    MethodConfig,
    action_of,
    check_budget,
    check_guidance,
    combined_cost,
    combined_use,
    get_method,
    solve_for_budget,
    split_variant,
)
from diffratio.surgery.measuring import Work, calibrate, measured_cost, measured_method
from diffratio.surgery.state import attachment, is_applied


def describe(transformer: nn.Module) -> Description:
    """Analytic costs of a transformer, converted or not."""
    return backbone_of(transformer).describe(transformer)


def _run_of(transformer: nn.Module, steps: int, guidance: bool, run: SamplingRun | None) -> SamplingRun:
    return run or backbone_of(transformer).default_run(transformer, steps, "cfg" if guidance else "none")


def macs(transformer: nn.Module, steps: int = 20, guidance: bool = True, run: SamplingRun | None = None) -> Cost:
    """Analytic MACs of a whole sampling run with what is applied.

    Where the cost depends on the input (`Method.static` is false), it is the mean over the samples that were made of a
    run of so many steps, and of random latents where none were; `is_measured` tells.

    Args:
        transformer: dense or converted.
        steps: shorthand for the backbone's default run of so many steps.
        guidance: whether both guidance halves are computed.
        run: the run itself, instead of the two above.

    Returns:
        total, per block, planning and the fraction of the dense run.

    Raises:
        DiffratioError: a method works on the guidance halves and the run has none.
    """
    run = _run_of(transformer, steps, guidance, run)
    if not is_applied(transformer):
        return Method(None, describe(transformer)).macs(run)
    state = attachment(transformer)
    if state.watching:
        return measured_cost(transformer, run)
    if len(state.methods) == 1:
        return state.token_method.macs(run)
    return combined_cost(state.methods, state.adapt(run), run)


def for_budget(
    method: str,
    transformer: nn.Module,
    budget: float,
    steps: int = 20,
    guidance: bool = True,
    run: SamplingRun | None = None,
    table: LatencyTable | str | Path | None = None,
    work: Work | None = None,
) -> MethodConfig:
    """The config of a method that costs within [budget - 0.01, budget] of the dense run.

    Args:
        method: registered name; `name:variant` for a method with variants, such as `external_cache:mag_cache`.
        transformer: dense or converted.
        budget: fraction of the dense run's MACs, or milliseconds with a table; lower keeps fewer tokens.
        steps: shorthand for the backbone's default run of so many steps.
        guidance: whether both guidance halves are computed.
        run: the run itself, instead of the two above.
        table: what `diffratio bench table` wrote for this model: the budget is then in its milliseconds.
        work: for methods whose cost is measured: samples whole runs with the converted transformer that it is given;
            None takes random latents.

    Raises:
        BudgetUnreachable: with the reachable range.
        DiffratioError: unknown method, a budget outside (0, 1], a method that needs guidance on a run without it, a
            table of another model, or one for a method without a keep schedule.

    Example:
        >>> import diffratio
        >>> transformer = diffratio.backbones.get_backbone("dit").tiny()
        >>> diffratio.for_budget("fewer_steps", transformer, budget=0.8, steps=20)
        FewerSteps(keep=0.8)
    """
    cls, run = get_method(method), _run_of(transformer, steps, guidance, run)
    check_guidance(cls, run)
    description, costs = describe(transformer), None
    if not cls.static:
        if table is not None:
            raise DiffratioError(f"{cls.name}: its cost is measured in MACs; leave the table out")
        return calibrate(method, transformer, run, check_budget(budget), work)
    if table is not None:
        found = table if isinstance(table, LatencyTable) else load_cost_table(table)
        costs = found.require(description, run).costs(run)
    return solve_for_budget(cls, description, run, check_budget(budget), costs, split_variant(method)[1])


def summary(transformer: nn.Module, steps: int = 20, guidance: bool = True, run: SamplingRun | None = None) -> str:
    """What is attached, tokens before and after per site, and MACs, as text.

    Raises:
        DiffratioError: nothing is attached.
    """
    state, dense = attachment(transformer), _run_of(transformer, steps, guidance, run)
    cost, run = macs(transformer, run=dense), state.adapt(dense)
    grid, actions = run.grid, [action_of(state.methods, step, run) for step in range(run.steps)]
    both = sum(run.halves_at(step) == 2 for step in range(run.steps))
    reused = sum(isinstance(action, Reuse) for action in actions)
    skipping = sum(isinstance(action, Skip) for action in actions)
    guided = run.guidance if run.guided is None else f"{run.guidance} in {both} of them"
    mark = ", measured" if state.watching else ""
    lines = [
        f"{type(transformer).__name__} ({state.backbone.name}), {grid.height}x{grid.width} tokens, "
        f"{run.steps} steps, guidance {guided}",
        "method: " + ", ".join(repr(one.config) for one in state.methods),
        f"MACs: {cost.total / 1e9:.3f} G of {cost.dense / 1e9:.3f} G dense ({cost.fraction:.3f}{mark}), "
        f"planning {cost.planning / max(cost.total, 1):.2%}",
    ]
    if reused or skipping:
        full = run.steps - reused - skipping
        lines.append(f"steps: {full} full, {skipping} with skipped blocks, {reused} that reuse the last output")
    stored = sum(method.stored_numbers(run) for method in state.methods)
    if stored:
        dtype = next(transformer.parameters()).dtype
        size = stored * dtype.itemsize / 2**20
        lines.append(f"stored from step to step: {size:.3g} MiB a sample in {str(dtype).removeprefix('torch.')}")
    if (measured := measured_method(state)) is not None:
        return "\n".join([*lines, _counted(measured, run)])
    for layer, block in enumerate(state.token_method.description.blocks):
        evaluated = [step for step in range(run.steps) if not isinstance(actions[step], Reuse)]
        uses = [combined_use(state.methods, layer, step, run, actions[step]) for step in evaluated]
        names = dict.fromkeys(site.name for site in block.sites)
        lines.append(f"  block {layer:2d}: " + ", ".join(_site(name, uses, grid.tokens) for name in names))
    return "\n".join(lines)


def is_measured(transformer: nn.Module) -> bool:
    """Whether the cost of what is applied is counted on real runs, since it depends on the input."""
    return is_applied(transformer) and bool(attachment(transformer).watching)


def forget_counts(transformer: nn.Module) -> None:
    """What was counted so far of a method whose cost is measured no longer stands in it."""
    for method in attachment(transformer).watching:
        method.forget_traces()


def statistics(transformer: nn.Module, run: SamplingRun) -> dict[str, float]:
    """What an attached cache did in the samples that were made of a run; empty without one, or without samples."""
    if not is_measured(transformer):
        return {}
    state = attachment(transformer)
    method = measured_method(state)
    return {} if method is None else method.statistics(state.adapt(run))


def _counted(method: Method, run: SamplingRun) -> str:
    found = method.statistics(run)
    results = found["cached_places"] * found["steps"]
    return (
        f"{method.name}: {found['skipped']:.1f} of {results:.0f} results taken from the cache "
        f"(hit rate {found['hit_rate']:.3f}), {found['full_steps']:.1f} of {found['steps']:.0f} steps in full, "
        f"means over {found['samples']:g} samples"
    )


def _site(name: str, uses: list[BlockUse], tokens: int) -> str:
    """`self_attention 64 -> 20..48`, over the evaluated steps and both guidance halves."""
    every = [*uses, *(use.unconditional for use in uses if use.unconditional)]
    pairs = [(0, 0) if use.bypassed else (use.tokens or {}).get(name, (tokens, tokens)) for use in every]
    text = f"{name} {tokens} -> {_range([queries for queries, _ in pairs])}"
    if any(keys != queries for queries, keys in pairs if queries) and any(keys for _, keys in pairs):
        text += f" (keys {_range([keys for _, keys in pairs])})"
    return text


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low}..{high}"
