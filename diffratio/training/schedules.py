"""Where a training job's fixed schedule comes from, and what a sensitivity map says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.conditions import Conditions
from diffratio.cost.macs import CostTable, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.files import read_json
from diffratio.methods.base import MethodConfig, config_to_json, get_method
from diffratio.methods.block_drop import BlockDropMethod
from diffratio.methods.routed import RoutedConfig
from diffratio.objectives import Objective
from diffratio.sensitivity import Sensitivity, find_map, required_map, verify

_RULES = ("mod", "hand")


def read_schedule(
    name: str,
    method: str,
    transformer: nn.Module,
    run: SamplingRun,
    budget: float,
    key: str = "schedule",
    costs: CostTable | None = None,
) -> dict[str, Any]:
    """Values of a method's config from `method.schedule=NAME`.

    Args:
        name: a keep schedule or routing.json (JSON), a sensitivity map, or a checkpoint that ships with a map.
        method: registered name; `block_drop` takes the map's order of blocks, every other one its schedule.
        transformer: dense; on the meta device its weights are not compared with the map's.
        run: the run that the budget counts.
        budget: fraction of its dense cost, for which a map is solved.
        key: of the method's config that names it, for messages.
        costs: cost table of the run, for a budget in its unit; None counts MACs.

    Raises:
        DiffratioError: no such file, or a map of another run or other weights.
        BudgetUnreachable: the map's path does not go that low.
    """
    path = find_map(name)
    if not path.endswith(".safetensors"):
        if not Path(path).is_file():
            raise DiffratioError(
                f"method.{key}: no file {name!r} and no checkpoint of that name ships with a sensitivity map; give "
                "a keep schedule (.json), or `diffratio measure EXPERIMENT --out FILE.safetensors`"
            )
        document = read_json(path, f"method.{key}")
        return {"schedule": document.get("method", document).get("schedule", document)}
    found = required_map(path, transformer, run)
    description = backbone_of(transformer).describe(transformer)
    if method == "block_drop":
        config = BlockDropMethod.for_budget(description, run, budget, found.block_order(), costs=costs)
        return {key: value for key, value in config_to_json(config).items() if key != "name"}
    return {"schedule": found.schedule(description, budget, costs=costs)}


def predicted_errors(
    name: str,
    method: MethodConfig,
    transformer: nn.Module,
    run: SamplingRun,
    budget: float,
    held_out: tuple[Tensor, Tensor, Objective, Conditions] | None = None,
) -> dict[str, Any]:
    """Untrained output errors that a map predicts at a budget: the experiment's own schedule among those of the rules.

    Args:
        name: a sensitivity map, or a checkpoint that ships with one.
        method: the experiment's config.
        transformer: dense, with weights.
        run: the run that the budget counts.
        budget: fraction of its dense MACs.
        held_out: images, labels, objective and conditions, to measure what was predicted; see `sensitivity.verify`.

    Returns:
        Predicted mean square error of the output, summed over regions with the map's weights, by schedule; None where
        it cannot be had.
    """
    found = required_map(name, transformer, run)
    description = backbone_of(transformer).describe(transformer)
    order = found.block_order()
    tables: dict[str, Any] = {}
    for rule in _RULES:
        tables[rule] = _attempt(lambda rule=rule: get_method(rule).for_budget(description, run, budget).schedule.bins)
    tables["block_drop"] = _attempt(
        lambda: BlockDropMethod.for_budget(description, run, budget, order).table(description.layers)
    )
    tables["measured"] = _attempt(lambda: found.schedule(description, budget).bins)
    errors = {rule: None if table is None else found.error(table) for rule, table in tables.items()}
    own = method.schedule.bins if isinstance(method, RoutedConfig) and method.schedule is not None else None
    answer: dict[str, Any] = {
        "this_schedule": None if own is None else found.error(own),
        **errors,
        "ranking": found.ranking,
        "block_order": list(order),
    }
    if held_out is not None:
        images, labels, objective, conditions = held_out
        own_tables = {"this_schedule": own, **tables}
        answer["verified"] = verify(found, transformer, images, labels, objective, own_tables, conditions=conditions)
    return answer


def _attempt(solve: Any) -> Any:
    try:
        return solve()
    except BudgetUnreachable:
        return None


def along(found: Sensitivity, transformer: nn.Module) -> dict[str, Any]:
    """Predicted errors on a map's path at round budgets, and the order in which blocks are dropped."""
    description = backbone_of(transformer).describe(transformer)
    costs = macs_table(description, found.run)
    lowest = min(costs.fraction(table) for table in found.path.tables())
    errors = {}
    for twentieth in range(19, 1, -1):
        if twentieth / 20 >= lowest:
            errors[f"{twentieth / 20:g}"] = _attempt(
                lambda twentieth=twentieth: found.predicted(description, twentieth / 20)
            )
    return {
        "predicted_error": errors,
        "lowest_budget": lowest,
        "region_weights": found.model.weights.tolist(),
        "block_order": list(found.block_order()),
    }
