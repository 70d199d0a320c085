"""Made-up comparison folders for the tests of the report; no figure in here was measured."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffratio.cost.run import uniform_run
from diffratio.evaluation.records import Arm, Record, write_record
from diffratio.tokens.grid import TokenGrid


def png(path: Path, width: int, height: int, seed: int = 0) -> None:
    """Writes a small grey picture of noise on a soft slope."""
    draw = random.Random(seed)
    rows = b"".join(
        b"\0" + bytes((x * 160 // width + y * 60 // height + draw.randrange(30)) % 256 for x in range(width))
        for y in range(height)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def estimate(value: float, half: float = 0.3, n: int = 500) -> dict[str, Any]:
    """A value with a symmetric 95 % interval."""
    return {"value": value, "low": value - half, "high": value + half, "stderr": half / 1.96, "n": n}


def make_record(
    name: str = "diffcr",
    budget: float = 0.8,
    seed: int = 0,
    kid: float = 2.0,
    half: float = 0.3,
    excess: float = 0.001,
    ratio: float = 0.85,
    **changes: Any,
) -> Record:
    """A complete record with round figures."""
    fraction = changes.pop("fraction", budget - 0.003 if budget < 1 else 1.0)
    dense = name == "dense"
    timings = [
        {
            "batch": batch,
            "mode": "eager",
            "median_ms": base * ratio,
            "q1_ms": base * ratio * 0.98,
            "q3_ms": base * ratio * 1.03,
            "dense_median_ms": base,
            "repeats": 10,
            "efficiency": 0.0 if fraction == 1 else (1 - ratio) / (1 - fraction),
        }
        for batch, base in ((1, 210.0), (8, 1240.0))
    ]
    content: dict[str, Any] = {
        "arm": Arm(name, f"fashion-dit-{name}", {"name": name, "ratio": 0.5}, finetuned_steps=300),
        "budget": budget,
        "seed": seed,
        "n": 500,
        "run": uniform_run(20, TokenGrid(16, 16)),
        "sampler": "flow_euler",
        "guidance_scale": 2.0,
        "cost": {
            "macs": int(1e9 * fraction),
            "macs_dense": 1_000_000_000,
            "fraction": fraction,
            "latency": timings,
            "peak_memory_mib": None,
        },
        "quality": {
            "kid_lite0": estimate(kid, half),
            "kid_lite0_vs_dense": None if dense else estimate(kid - 1.8, half / 2),
            "fd_lite0": {"value": 10 * kid, "n": 500},
            "excess_loss": estimate(excess, 0.0004),
            "excess_loss_regions": [estimate(excess * (r + 1) / 2.5, 0.0004) for r in range(4)],
            "psnr": None if dense else 31.2,
            "ssim": None if dense else 0.912,
            "feature_distance": None if dense else 0.12,
        },
        "provenance": {
            "git": "0123456789ab",
            "packages": {"torch": "2.0"},
            "device": "a CPU",
            "extractor": "lite0@96:abc",
            "created": f"2026-01-0{seed + 1}T10:00:00+00:00",
        },
    }
    return Record(**{**content, **changes})


def make_folder(folder: Path, seeds: tuple[int, ...] = (0,)) -> list[Record]:
    """A comparison of several arms at two budgets, with one arm not reached and one failed."""
    draw = random.Random(0)
    table = {
        "block": {
            "title": "One block, d = 1152, N = 1024",
            "rows": [
                {"keep": 0.5, "dense_ms": 41.2, "routed_ms": 21.9, "efficiency": 0.953, "overhead": 1.04},
                {"keep": 0.8, "dense_ms": 41.2, "routed_ms": 33.6, "efficiency": 0.921, "overhead": 1.03},
            ],
        }
    }
    records = []
    plan = [
        ("dense", 1.0, 1.8, 0.0, 1.0),
        ("diffcr", 0.8, 1.9, 0.0008, 0.83),
        ("mod", 0.8, 3.1, 0.0031, 0.84),
        ("tome", 0.8, 5.2, 0.0082, 0.97),
        ("fewer_steps", 0.8, 3.0, 0.0, 0.801),
        ("diffcr", 0.6, 3.4, 0.0043, 0.65),
        ("mod", 0.6, 3.6, 0.0062, 0.66),
        ("tome", 0.6, 9.1, 0.0151, 0.92),
        ("fewer_steps", 0.6, 5.8, 0.0, 0.602),
    ]
    for name, budget, kid, excess, ratio in plan:
        for seed in seeds:
            low = 3 if budget < 0.7 else 0
            bins = [[max(0, 10 - (layer + 2 * region) % 5 - low) for region in range(4)] for layer in range(12)]
            images: dict[str, Any] = {"samples": f"images/{name}-{100 * budget:g}-s{seed}.png"}
            # as a comparison lays them out: 10 pictures of 32 x 32 in a row, magnified 3 times, 3 white pixels between
            png(folder / images["samples"], 10 * 99 - 3, 2 * 99 - 3, seed)
            if name == "diffcr":
                images["masks"] = [f"images/mask-{100 * budget:g}-s{seed}.png"]
                png(folder / images["masks"][0], 320, 64, seed)
            record = make_record(name, budget, seed, kid + draw.uniform(-0.1, 0.1), excess=excess, ratio=ratio)
            schedule = {"bins": bins} if name in ("diffcr", "mod") else None
            record = replace(record, schedule=schedule, images=images, extra=table if name == "dense" else {})
            if name == "tome":
                record = replace(record, arm=Arm(name, "fashion-dit-start", {"name": name}, as_published=False))
            records.append(record)
    unreached = Arm("todo", "fashion-dit-start", {"name": "todo"})
    message = "todo cannot reach a budget of 0.6: on this run it costs 0.841 to 1.000 of the dense MACs"
    records.append(Record(unreached, 0.6, 0, status="unreachable", message=message))
    broken = Arm("dato", "fashion-dit-start", {"name": "dato"})
    records.append(Record(broken, 0.8, 0, status="failed", message="out of memory"))
    for record in records:
        write_record(folder, record)
    return records
