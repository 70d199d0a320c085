"""`bench table` by the command line, on a tiny model; no test asserts how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import MODEL
from torch import nn

from diffratio.backbones import backbone_of
from diffratio.bench import latency
from diffratio.bench.latency import bench_table
from diffratio.bench.settings import BenchSettings, TableSettings
from diffratio.cli import main
from diffratio.cost.latency import timing
from diffratio.cost.macs import BlockCost
from diffratio.cost.table import load_cost_table

TINY = "overrides=[" + ",".join(f"'{one}'" for one in MODEL) + "]"
FEW = ["debug=cpu", "repeats=2", "warmup=0", "threads=1", "experiment=fashion_pretrain", TINY]


def test_the_command_writes_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "table.json"
    assert main(["bench", "table", *FEW, "batch=3", "alignment=4", f"out={out}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bench"] == "table" and document["table"] == json.loads(out.read_text())
    table = load_cost_table(out)
    assert (table.family, table.model, table.layers, table.width) == ("dit", "DiTTransformer2DModel", 3, 32)
    assert (table.grid.tokens, table.batch, table.alignment, table.threads) == (16, 3, 4, 1)
    assert (table.dtype, table.repeats, table.warmup) == ("float32", 2, 0) and "1 threads" in table.device
    assert table.shapes == (0, 0, 0) and len(table.block_ms) == 1
    assert set(table.forward_ms) == {"dense", "half", "bypassed"} and "torch" in table.provenance["packages"]
    row = table.block_ms[0]
    assert 0 < row[0] < row[10] and all(value > 0 for value in row)
    # 16 tokens in multiples of 4: bins of equal k are one measurement
    assert row[1] == row[2] and row[3] == row[4] == row[5] and row[6] == row[7] and row[8] == row[9] == row[10]
    assert 9 not in table.allowed_bins and 8 not in table.allowed_bins
    assert {row["kept"] for row in document["rows"] if "kept" in row} == {0, 4, 8, 12, 16}
    assert main(["bench", "table", *FEW]) == 0
    text = capsys.readouterr().out
    assert "Bins that pay: " in text and "3 blocks, 1 different" in text and "added up from its parts" in text


def test_parts_are_put_together_on_the_scale_of_the_dense_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats that drift by a factor of two give the same table."""
    drift = [1.0, 2.0, 1.5]

    def measured(*arguments: Any) -> dict[str, Any]:
        milliseconds = {name: _fake_ms(name) for name in arguments[0]}
        return {name: timing([value * one for one in drift]) for name, value in milliseconds.items()}

    monkeypatch.setitem(latency.measure.__globals__, "interleaved", measured)
    own = TableSettings(experiment="fashion_pretrain", overrides=tuple(MODEL))
    rows, table = bench_table(BenchSettings(repeats=3), own, "cpu", torch.float32)
    assert table.forward_ms["dense"] == pytest.approx(1.5 * 40)
    assert table.block_ms[0] == pytest.approx([1.5 * kept / 3 for kept in (0.5, 2, 4, 5, 7, 8, 10, 12, 13, 15, 16)])
    assert table.outer_ms == pytest.approx(1.5 * (4 - 0.5))
    assert len(rows) == 11 + 3


def _fake_ms(name: str) -> float:
    """Three blocks of k tokens take k ms together (half a millisecond where bypassed), forwards 40, 20 and 4."""
    if name.startswith("forward"):
        return {"dense": 40.0, "bypassed": 4.0}.get(name.split()[-1], 20.0)
    return float(name.rsplit("=", 1)[1]) or 0.5


def test_blocks_run_as_they_are_routed() -> None:
    from diffratio.backbones import get_backbone

    transformer: Any = get_backbone("dit").tiny().eval()
    run = backbone_of(transformer).default_run(transformer, 1, "none")
    seen: list[int] = []
    for block in transformer.transformer_blocks:
        block.ff.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    calls = latency._block_calls(transformer, run, TableSettings(batch=2), 0)
    seen.clear()
    for bin_ in (0, 3, 5, 10):
        calls([0, 2], bin_)()
    assert seen == [5, 5, 8, 8, 16, 16]


def test_blocks_of_other_sizes_are_other_shapes() -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4)])
    same = BlockCost((), 1)
    assert latency._shapes(blocks, (same,) * 3) == (0, 1, 0)
    assert latency._shapes(blocks, (same, same, BlockCost((), 2))) == (0, 1, 2)
    assert latency._name([[0, 2], [1]], 0, 7) == "2 blocks of shape 0, k = 7"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights=nowhere"], "nowhere"),
        (["weights=fashion-dit-diffcr-80"], "is a routed checkpoint; give the dense one"),
        (["batch=0"], "batch must be at least 1, got 0"),
        (["alignment=0"], "alignment must be at least 1, got 0"),
        (["overrides=['seed=1']"], "give experiment=NAME as well"),
        (["experiment=fashion_modd"], "did you mean fashion_mod"),
        (["out=table.txt"], "ends in .json"),
        (["batc=1"], "did you mean batch"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "table", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert message in captured.err.splitlines()[-1]
