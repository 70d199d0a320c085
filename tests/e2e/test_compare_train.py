"""`compare train=true`: the learned arms and their dense control are trained alike, and an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import MODEL, TINY, fashion_subset

from diffratio import cli
from diffratio.backbones import get_backbone
from diffratio.checkpoint import export
from diffratio.evaluation.records import read_records
from diffratio.sampling.schedulers import make_scheduler

CARD = {"name": "tiny", "objective": "flow", "sampler": {"name": "flow_euler", "steps": 4, "guidance_scale": 2.0}}


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    code = cli.main(["compare", *words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_train_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    data, base = fashion_subset(tmp_path / "data"), tmp_path / "base"
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "patch_size": 8}
    transformer = get_backbone("dit").tiny(sample_size=32, **sizes)
    export(transformer, base, card=CARD, scheduler=make_scheduler("flow_euler"))
    tiny = [word for word in TINY if word not in MODEL and not word.startswith("trainer.max_steps")]
    tiny = [word for word in tiny if not word.startswith("trainer.enable_progress_bar")]
    out = tmp_path / "out"
    words = [
        "debug=cpu_compare", f"weights={base}", f"data.source={data}", f"paths.output_dir={out}", "device=cpu",
        "train=true", "train_steps=4", "methods=[mod,fewer_steps]", "n=4", "latency_repeats=0", "reference_n=8",
        f"train_overrides={[*tiny, f'data.source={data}', 'trainer.devices=2']}",  # one is what an arm gets
    ]  # fmt: skip
    plan = answer(capsys, *words, "dry_run=true")["plan"]
    assert {row["arm"] for row in plan["arms"] if row["status"] == "to train"} == {"dense_finetuned", "mod"}
    assert not out.exists()
    rows = answer(capsys, *words)["arms"]
    assert {row["arm"]: row["paired_with"] for row in rows} == {
        "dense": None,
        "dense_finetuned": "dense",
        "mod": "dense_finetuned",
        "fewer_steps": "dense",
        "fewer_steps@finetuned": "dense_finetuned",
    }
    records = {record.arm.name: record for record in read_records(out)}
    assert {name: record.arm.finetuned_steps for name, record in records.items()} == {
        "dense": None, "dense_finetuned": 4, "mod": 4, "fewer_steps": None, "fewer_steps@finetuned": 4,
    }  # fmt: skip
    assert 0.79 <= records["mod"].cost["fraction"] <= 0.8
    configs = [(out / "runs" / name / "config.yaml").read_text() for name in ("mod-80-s0", "dense_finetuned-100-s0")]
    shared = [{line for line in text.splitlines() if "lr:" in line or "distill" in line} for text in configs]
    assert shared[0] == shared[1] and len(shared[0]) >= 3

    monkeypatch.setattr("diffratio.training.arms.train", None)  # a finished arm is not trained again
    again = answer(capsys, *words)
    assert again["finished_before"] == 5
    assert cli.main(["compare", *words, "train_steps=5"]) == 2
    assert "was begun with trainer.max_steps=4, now it is 5" in capsys.readouterr().err
    assert cli.main(["compare", *[word for word in words if not word.startswith("train_overrides")]]) == 2
    assert "to train_overrides=" in capsys.readouterr().err
