"""Comparisons of seconds: tiny checkpoints, few real pictures, features that cost nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffratio
from diffratio import surgery
from diffratio.backbones import get_backbone
from diffratio.checkpoint import export
from diffratio.data.images import ImageData
from diffratio.evaluation.compare import measuring, running
from diffratio.sampling.schedulers import make_scheduler

DATA = ImageData("fashion_mnist", image_size=32, channels=1, num_classes=10)
CARD: dict[str, Any] = {
    "name": "tiny",
    "backbone": "dit",
    "objective": "flow",
    "sampler": {"name": "flow_euler", "steps": 20, "guidance_scale": 2.0},
    "data": "none",
}
TIMES = ("latency", "peak_memory_mib")


class PooledPixels:
    """Sixteen mean grey values: features without a network."""

    id = "lite0-pooled"  # stands in for them, so it may bear their figures

    def __init__(self, device: str = "cpu") -> None:
        self.calls = 0

    def extract(self, images: Tensor, batch_size: int = 64) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def make_checkpoints(folder: Path) -> dict[str, str]:
    """`dense`, `tuned` (dense, other weights, 7 steps), and `routed` (mod at 0.8, 7 steps)."""
    torch.manual_seed(0)
    scheduler = make_scheduler("flow_euler")
    transformer = get_backbone("dit").tiny(sample_size=32, patch_size=4)
    export(transformer, folder / "dense", card=CARD, scheduler=scheduler)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tuned = CARD | {"training": {"steps": 7}}
    export(transformer, folder / "tuned", card=tuned, scheduler=scheduler)
    surgery.apply_(transformer, diffratio.for_budget("mod", transformer, 0.8, steps=5))
    export(transformer, folder / "routed", card=tuned | {"kind": "routed"}, scheduler=scheduler)
    return {name: str(folder / name) for name in ("dense", "tuned", "routed")}


def settings(checkpoints: dict[str, str], out: Path, **changes: Any) -> dict[str, Any]:
    """A whole config; by default the dense model and tome, without times."""
    return {
        "name": "compare",
        "weights": checkpoints["dense"],
        "methods": ["tome"],
        "routed": [],
        "finetuned": None,
        "budgets": [0.8],
        "seeds": [0],
        "n": 4,
        "steps": 5,
        "guidance_scale": 2.0,
        "batch_size": 4,
        "reference_n": 8,
        "validation_n": 4,
        "latency_batches": [2],
        "latency_repeats": 0,
        "block_repeats": 0,
        "device": "cpu",
        "paths": {"output_dir": str(out)},
    } | changes


def light(monkeypatch: pytest.MonkeyPatch, folder: Path, probes: bool = False) -> None:
    """No network for features, no report and, unless asked for, no probes: for tests of what is measured when."""
    if not probes:
        monkeypatch.setattr(measuring, "probe", lambda one, dense, guidance_scale: ((), torch.zeros(1)))
    paths = SimpleNamespace(
        html=folder / "report.html", markdown=folder / "report.md", csv=folder / "records.csv", compact=None
    )
    monkeypatch.setattr(running, "Lite0Features", PooledPixels)
    monkeypatch.setattr(running, "write_report", lambda path, title, compact: paths)


def timeless(folder: Path) -> dict[str, Any]:
    """Every record of a folder without its times, memory and the moment it was made."""
    found = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text())
        for key in TIMES:
            record["cost"].pop(key, None)
        record["provenance"].pop("created", None)
        found[path.stem] = record
    return found
