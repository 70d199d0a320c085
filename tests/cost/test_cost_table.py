"""The measured cost table: what pays, what its file holds, what it refuses, what it gives to solvers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cost_tables import STEP, STEP_BINS, latency_table
from hypothesis import given
from hypothesis import strategies as st

from diffratio.cost.macs import ALL_BINS, CostTable, Description, macs_table, ratio_table
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.cost.table import LatencyTable, load_cost_table, paying_bins, save_cost_table
from diffratio.errors import DiffratioError
from diffratio.files import write_json
from diffratio.surgery import describe
from diffratio.tokens.grid import TokenGrid

RUN = uniform_run(20, TokenGrid(4, 4))
rows = st.lists(st.floats(0, 100), min_size=10, max_size=10).map(lambda row: (*row, 50.0))


@pytest.mark.parametrize(
    ("table", "bins"),
    [
        ([range(11)], ALL_BINS),
        ([STEP], STEP_BINS),
        ([[0, 1, 2, 3, 2.5, 5, 6, 7, 8, 9, 10]], (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)),  # 3 is slower than 4
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9.95, 10]], (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)),  # half a percent is noise
        ([[10] * 11], (10,)),
        ([[12] * 10 + [10]], (10,)),
        ([range(11), STEP], STEP_BINS),  # a bin must pay in every block
    ],
)
def test_bins_that_pay(table: Any, bins: tuple[int, ...]) -> None:
    assert paying_bins([tuple(map(float, row)) for row in table]) == bins


@given(st.lists(rows, min_size=1, max_size=3))
def test_paying_bins_rise_in_cost_in_every_block(table: list[tuple[float, ...]]) -> None:
    bins = paying_bins(table)
    assert bins[-1] == 10
    for row in table:
        assert all(row[low] < row[high] for low, high in zip(bins, bins[1:], strict=False))


def test_file_round_trip(tmp_path: Path) -> None:
    table = latency_table(alignment=8, shapes=(0, 1, 0), block_ms=(STEP, tuple(map(float, range(11)))))
    path = tmp_path / "new" / "table.json"
    save_cost_table(path, table)
    assert load_cost_table(path) == table and hash(load_cost_table(path)) == hash(table)
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("diffratio-cost-table", 1)
    assert document["allowed_bins"] == list(STEP_BINS)


GOOD = latency_table().to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a document of format"),
        ({"version": 2}, "version 2, and this release reads version 1"),
        ({"widht": 3}, "unknown key of a cost table 'widht': did you mean width"),
        ({"width": 0}, "width 0 must be an integer of 1 to"),
        ({"width": 3.5}, "width 3.5"),
        ({"batch": True}, "batch True"),
        ({"warmup": -1}, "warmup -1"),
        ({"alignment": 10**6}, "alignment 1000000"),
        ({"family": ""}, "family '' must be a name"),
        ({"device": None}, "device None"),
        ({"dtype": "float8"}, "unknown dtype of a cost table 'float8'"),
        ({"grid": [4]}, "must be [height, width]"),
        ({"grid": [0, 4]}, "token grid 0x4"),
        ({"grid": "4x4"}, "must be [height, width]"),
        ({"shapes": []}, "shapes must name"),
        ({"shapes": [0, 1, 0]}, "one of the 1 rows"),
        ({"shapes": [0, 0, 0.0]}, "shapes must be integers"),
        ({"shapes": 3}, "shapes must be a list"),
        ({"block_ms": []}, "shapes must name"),
        ({"block_ms": [list(range(10))]}, "block_ms[0] has 10 bins; it takes 11"),
        ({"block_ms": [STEP[:10] + (float("nan"),)]}, "list of lists"),
        ({"block_ms": [[*STEP[:10], float("nan")]]}, "block_ms[0][10] nan must be a finite number"),
        ({"block_ms": [[*STEP[:10], float("inf")]]}, "block_ms[0][10] inf"),
        ({"block_ms": [[-1.0, *STEP[1:]]]}, "block_ms[0][0] -1.0 must be a finite number of milliseconds, at least 0"),
        ({"block_ms": [["1", *STEP[1:]]]}, "block_ms[0][0] '1'"),
        ({"block_ms": [[True, *STEP[1:]]]}, "block_ms[0][0] True"),
        ({"block_ms": [[*STEP[:10], 0]]}, "takes no time"),
        ({"outer_ms": float("inf")}, "outer_ms inf"),
        ({"outer_ms": -0.5}, "outer_ms -0.5"),
        ({"outer_ms": None}, "outer_ms None"),
        ({"forward_ms": {"dense": "fast"}}, "forward_ms['dense'] 'fast'"),
        ({"forward_ms": [1]}, "forward_ms must be a mapping"),
        ({"provenance": None}, "provenance must be a mapping"),
    ],
)
def test_documents_that_are_no_table_are_refused(change: dict[str, Any], message: str) -> None:
    LatencyTable.from_json(GOOD)
    with pytest.raises(DiffratioError) as caught:
        LatencyTable.from_json(GOOD | change)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("key", sorted(set(GOOD) - {"format", "version", "allowed_bins"}))
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(DiffratioError, match=f"it has no {key}; "):
        LatencyTable.from_json({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize("document", [None, [], 3, "table", {}])
def test_other_documents_are_refused(document: object) -> None:
    with pytest.raises(DiffratioError, match="diffratio bench table"):
        LatencyTable.from_json(document)


def test_files_that_are_no_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="cost table: no file"):
        load_cost_table(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DiffratioError, match="bad.json' cannot be read as JSON"):
        load_cost_table(tmp_path / "bad.json")
    write_json(tmp_path / "low.json", GOOD | {"outer_ms": -1})
    with pytest.raises(DiffratioError, match="low.json': cost table: outer_ms -1"):
        load_cost_table(tmp_path / "low.json")


def test_costs_of_a_run() -> None:
    table = latency_table()
    costs = table.costs(RUN)
    assert costs.cells == (STEP,) * 3 and costs.outer == 1.0 and costs.dense == 31.0
    assert (costs.unit, costs.alignment, costs.allowed_bins, costs.levels) == ("latency", 1, STEP_BINS, STEP_BINS[1:])
    assert costs.fraction([[10]] * 3) == 1.0 and costs.fraction([[0]] * 3) == pytest.approx(1.03 / 31)
    # a forward holds both halves: 20 of them, at the whole batch each
    assert table.run_ms(RUN) == pytest.approx(20 * 31) and table.run_ms(RUN, 0.5) == pytest.approx(10 * 31)
    assert table.run_ms(uniform_run(20, TokenGrid(4, 4), "none")) == pytest.approx(20 * 31)
    half = SamplingRun(RUN.noise_levels, RUN.grid, guided=(True,) * 10 + (False,) * 10)
    assert table.run_ms(half) == pytest.approx(15 * 31)  # steps without guidance take half the batch


def test_a_table_of_another_model_is_refused() -> None:
    from diffratio.backbones import get_backbone

    def described(**changes: Any) -> Description:
        return describe(get_backbone("dit").tiny(**changes))

    table = latency_table(width=16)
    assert table.require(described(), RUN) is table
    for description, run, message in [
        (described(num_layers=4), RUN, "dit of 3 blocks, width 16, 4x4 tokens, and this is dit of 4 blocks"),
        (described(attention_head_dim=16), RUN, "this is dit of 3 blocks, width 32"),
        (described(), uniform_run(20, TokenGrid(8, 8)), "8x8 tokens; `diffratio bench table`"),
        (described(), uniform_run(20, TokenGrid(4, 4), text_tokens=7), "4x4 tokens, 7 text tokens"),
    ]:
        with pytest.raises(DiffratioError) as caught:
            table.require(description, run)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_smoothed_table_joins_allowed_bins_by_lines() -> None:
    costs = latency_table().costs(RUN)
    assert costs.smoothed().cells[0] == pytest.approx((0.01, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    lowest = latency_table((0.0, 3.0, 3.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)).costs(RUN)
    assert lowest.levels[0] == 3 and lowest.smoothed().cells[0][:4] == (0.0, 3.0, 3.0, 3.0)
    from diffratio.backbones import get_backbone

    macs = macs_table(describe(get_backbone("dit").tiny()), RUN)
    assert macs.smoothed() is macs and macs.allowed_bins == ALL_BINS and macs.unit == "macs"


@given(st.lists(st.lists(st.integers(0, 10), min_size=4, max_size=4), min_size=3, max_size=3))
def test_mean_ratio_counts_blocks_and_steps(bins: list[list[int]]) -> None:
    counts = RUN.region_counts(4)
    mean = sum(count * bin_ / 10 for row in bins for count, bin_ in zip(counts, row, strict=True)) / (3 * RUN.steps)
    assert ratio_table(3, RUN).fraction(bins) == pytest.approx(mean)


@pytest.mark.parametrize("bins", [(), (0, 1), (10, 5), (5, 5, 10), (5, 11), (5.0, 10), (True, 10), "10", None])
def test_allowed_bins_that_make_no_sense_are_refused(bins: Any) -> None:
    with pytest.raises(DiffratioError, match="must be rising integers of 0..10, 10 among them"):
        CostTable((tuple(map(float, range(11))),), 0.0, 10.0, RUN, allowed_bins=bins)
    with pytest.raises(DiffratioError, match="unknown unit of a cost table 'seconds'"):
        CostTable((tuple(map(float, range(11))),), 0.0, 10.0, RUN, unit="seconds")
