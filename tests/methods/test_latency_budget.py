"""The rules' schedules for a budget in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cost_tables import STEP_BINS, latency_table

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.macs import ratio_table
from diffratio.cost.run import uniform_run
from diffratio.cost.table import save_cost_table
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods.base import config_from_json, config_to_json, get_method, solve_for_budget
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid

RUN = uniform_run(20, TokenGrid(4, 4))
LAYERS = 6
TAKING = ["mod", "hand", "random_keep", "block_drop"]


def dit() -> Any:
    return get_backbone("dit").tiny(num_layers=LAYERS)


def table(**more: Any) -> Any:
    return latency_table(layers=LAYERS, width=16, **more)


@pytest.mark.parametrize("budget", [0.9, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("method", TAKING)
def test_rules_meet_milliseconds_with_bins_that_pay(method: str, budget: float) -> None:
    config: Any = diffratio.for_budget(method, dit(), budget, run=RUN, table=table(alignment=4))
    schedule, costs = config.schedule, table().costs(RUN)
    assert budget - 0.01 <= costs.fraction(schedule.bins) <= budget
    assert {bin_ for row in schedule.bins for bin_ in row} <= set(STEP_BINS)
    assert (schedule.unit, schedule.alignment, schedule.allowed_bins) == ("latency", 4, STEP_BINS)
    assert config_from_json(config_to_json(config)) == config
    transformer = diffratio.apply_(dit(), config)
    assert all(use % 4 == 0 for use in _kept(transformer))


def _kept(transformer: Any) -> set[int]:
    """Computed tokens over the run."""
    method = attachment(transformer).token_method
    uses = [method.use(layer, step, RUN) for layer in range(LAYERS) for step in range(RUN.steps)]
    return {16 if use.tokens is None else use.tokens["feed_forward"][0] for use in uses}


def test_a_file_is_taken_as_well(tmp_path: Path) -> None:
    save_cost_table(tmp_path / "t.json", table())
    given = diffratio.for_budget("mod", dit(), 0.8, run=RUN, table=tmp_path / "t.json")
    assert given == diffratio.for_budget(
        "mod", dit(), 0.8, run=RUN, table=diffratio.load_cost_table(tmp_path / "t.json")
    )
    assert given != diffratio.for_budget("mod", dit(), 0.8, run=RUN)


def test_mean_ratio_is_a_unit_too() -> None:
    config: Any = solve_for_budget(get_method("mod"), describe(dit()), RUN, 0.75, ratio_table(LAYERS, RUN))
    assert config.keep == pytest.approx(0.75, abs=0.01) and config.schedule.unit == "mean_ratio"


@pytest.mark.parametrize("method", ["tome", "fewer_steps", "diffcr", "dense"])
def test_methods_without_a_schedule_of_their_own_are_refused(method: str) -> None:
    with pytest.raises(DiffratioError, match=f"{method}: its budget counts MACs; a budget in latency is for .*mod"):
        diffratio.for_budget(method, dit(), 0.8, run=RUN, table=table())


def test_measured_says_where_its_schedule_comes_from() -> None:
    with pytest.raises(BudgetUnreachable, match="diffratio measure"):
        diffratio.for_budget("measured", dit(), 0.8, run=RUN, table=table())


def test_tables_that_do_not_serve_are_refused() -> None:
    with pytest.raises(DiffratioError, match="it was timed on dit of 3 blocks"):
        diffratio.for_budget("mod", dit(), 0.8, run=RUN, table=latency_table(width=16))
    never = table(row=(20.0,) * 10 + (10.0,))
    with pytest.raises(DiffratioError, match="bypassing a block does not pay"):
        diffratio.for_budget("block_drop", dit(), 0.8, run=RUN, table=never)
    with pytest.raises(BudgetUnreachable, match=r"costs 1.000 to 1.000"):
        diffratio.for_budget("mod", dit(), 0.8, run=RUN, table=never)
