"""Every JSON document that is shared, mutated: it is read, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import fuzzed, mutated
from hypothesis import strategies as st

from diffratio.checkpoint import read_card
from diffratio.checkpoint.card import Card
from diffratio.checkpoint.parts import scheduler_of
from diffratio.conditions.identity import EncoderId
from diffratio.conditions.index import read_index
from diffratio.cost.macs import BlockCost, Description
from diffratio.cost.run import uniform_run
from diffratio.cost.table import LatencyTable, load_cost_table
from diffratio.data.manifest import LatentShard, Manifest, read_manifest
from diffratio.errors import DiffratioError, in_one_line
from diffratio.evaluation.records import Arm, Record, read_records
from diffratio.files import sha256
from diffratio.methods.base import config_from_json
from diffratio.methods.step_front import FrontEntry, StepFront, read_schedules
from diffratio.methods.step_masks import is_mask, read_mask
from diffratio.methods.step_schedule import StepSchedule
from diffratio.routing.schedule import KeepSchedule
from diffratio.sampling.schedulers import make_scheduler
from diffratio.sampling.vae import VaeId
from diffratio.search.folder import SearchFolder
from diffratio.tokens.grid import TokenGrid

RUN = uniform_run(4, TokenGrid(4, 4))
MODEL = Description("dit", 16, (BlockCost(()),) * 3, per_token=0, fixed=0)
STEPS = StepSchedule.made_for(MODEL, RUN, "CSCR", (0.5, 0, 0, 0))
KEEP = KeepSchedule(((10, 10), (5, 3), (2, 7)), RUN, 0.8)
RECORD = Record(
    Arm("a", "w", {"name": "dense"}),
    0.5,
    0,
    run=RUN,
    cost={"macs": 3, "latency": [{"batch": 1, "mode": "eager", "median_ms": 1.5}]},
    quality={"kid": {"value": 0.5, "low": 0.1}},
    images={"samples": "a.png"},
    extra={"t": {"title": "T", "rows": [{"a": 1}]}},
    schedule={"bins": [[1, 2], [3, 4]]},
)
TABLE = LatencyTable(
    "dit",
    "DiT",
    16,
    TokenGrid(4, 4),
    0,
    2,
    1,
    (0, 0),
    (tuple(range(11)),),
    1.0,
    "float32",
    "cpu",
    1,
    1,
    0,  # type: ignore[arg-type]
)


def _manifest(folder: Path) -> dict[str, Any]:
    (folder / "a.safetensors").write_bytes(b"12345678")
    shard = LatentShard("a.safetensors", 3, 2, 8, sha256(folder / "a.safetensors"))
    encoder = EncoderId("minilm", "r", 8, 16)
    vae = VaeId("v", "r", 4, 8, 0.18, 0.0)
    return Manifest("n", "s", 32, "float16", vae, encoder, "none", None, (), {"train": (shard,)}, shard).to_json()


def _read_mask(path: Path) -> None:
    if is_mask(path):
        read_mask(path, MODEL, RUN)


INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "id2label": {"0": "a"},
}
# name -> (document, file, what reads the folder)
KINDS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "keep schedule": (
        lambda f: {"name": "diffcr", "schedule": KEEP.to_json()},
        "m.json",
        lambda f: _method(f / "m.json"),
    ),
    "step schedule": (lambda f: STEPS.to_json(), "s.json", lambda f: read_schedules(f / "s.json")),
    "step front": (
        lambda f: StepFront((FrontEntry(STEPS, 0.5, 0.1, 0.2),)).to_json(),
        "front.json",
        lambda f: read_schedules(f).within(0.7),  # type: ignore[union-attr]
    ),
    "step mask": (lambda f: [1, 0, 1, 0], "mask.json", lambda f: _read_mask(f / "mask.json")),
    "card": (
        lambda f: Card("n", class_names=("a", "b"), text=EncoderId("minilm", "r", 8, 16), metrics={"m": 1.5}).to_json(),
        "card.json",
        read_card,
    ),
    "cost table": (lambda f: TABLE.to_json(), "t.json", lambda f: load_cost_table(f / "t.json").costs(RUN)),
    "record": (lambda f: RECORD.to_json(), f"records/{RECORD.id}.json", read_records),
    "manifest": (_manifest, "manifest.json", lambda f: read_manifest(f).latent_size),
    "search": (
        lambda f: {
            "format": "diffratio step search",
            "version": 2,
            "settings": {"n": 1},
            "timetables": {},
            "evaluated": {"CS": 0.5},
        },
        "search.json",
        lambda f: SearchFolder(f, {"n": 1}),
    ),
    "index": (lambda f: INDEX, "model_index.json", lambda f: read_index(f / "model_index.json")),
    "scheduler": (
        lambda f: dict(make_scheduler("dpm_solver", "noise").config) | {"_class_name": "DPMSolverMultistepScheduler"},
        "scheduler/scheduler_config.json",
        scheduler_of,
    ),
}


def _method(path: Path) -> Any:
    from diffratio.checkpoint.stored import stored_method
    from diffratio.files import read_json

    return stored_method(read_json(path, "method"))


@fuzzed(70, 900, st.data())
def _documents(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    make, file, read = KINDS[name]
    folder = tmp_path_factory.mktemp("document")
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    document = make(folder)
    path.write_bytes(data.draw(mutated(document)).encode("utf-8", "surrogatepass"))
    try:
        read(folder)
    except DiffratioError as error:
        assert in_one_line(error).isprintable()


test_documents, test_many_documents = _documents


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_unharmed_document_is_read(name: str, tmp_path: Path) -> None:
    make, file, read = KINDS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    import json

    (tmp_path / file).write_text(json.dumps(make(tmp_path)))
    read(tmp_path)


def test_a_method_config_with_a_file_name_is_no_stored_one(tmp_path: Path) -> None:
    STEPS.save(tmp_path / "s.json")
    document = {"name": "dato", "schedule": str(tmp_path / "s.json")}
    config_from_json(document)
    from diffratio.checkpoint.stored import stored_method

    with pytest.raises(DiffratioError, match="no file name"):
        stored_method(document)
