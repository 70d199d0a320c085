"""What a user types, mutated: every verb answers with a result or one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile import answered, fuzzed, words
from hypothesis import strategies as st

from diffratio import checkpoint
from diffratio.backbones import get_backbone

SAMPLE_FILES = ["image", "mask", "parts", "out", "npz"]
# verb -> words that it takes, and the options whose values are drawn; nothing here trains or measures
VERBS: dict[str, tuple[list[str], list[str]]] = {
    "ls": (["methods", "backbones", "data", "experiments", "checkpoints"], []),
    "show": (["fashion-dit", "emoji-pixart"], []),
    "sample": (
        ["TINY", "--n=1", "--steps=2", "--device=cpu", "--json"],
        ["n", "steps", "guidance", "seed", "batch-size", "device", "labels", "prompts"] + SAMPLE_FILES,
    ),
    "export": (["RUN", "--out=OUT"], ["out", "dtype"]),
    "train": (["data.source=./nowhere", "trainer.max_steps=1"], []),
    "precompute": (["data.source=./nowhere", "vae=./nowhere"], []),
    "compare": (["weights=./nowhere", "--dry-run"], []),
    "bench": (["nothing"], []),
    "search": (["weights=./nowhere"], []),
    "measure": (["./nowhere", "--out=x"], ["n", "regions", "lowest", "samples", "ranking", "seed", "out"]),
    "doctor": (["more"], []),
    "--help": ([], []),
    "": ([], []),
}
KEYS = [
    "method",
    "method.schedule",
    "backbone",
    "backbone.source",
    "backbone.config.num_layers",
    "backbone.config.sample_size",
    "budget.target",
    "budget.table",
    "budget.steps",
    "budget.unit",
    "data",
    "data.source",
    "data.image_size",
    "data.num_classes",
    "data.batch_size",
    "optimizer.lr",
    "trainer.max_steps",
    "trainer.precision",
    "objective",
    "seed",
    "lora",
    "lora.rank",
    "inpaint",
    "callbacks.final_n",
    "paths.output_dir",
    "ckpt_path",
    "experiment",
    "debug",
    "nothing",
    "+more",
    "~seed",
    "hydra.run.dir",
]
GRAMMAR = [
    "[",
    "{a:1}",
    "[1,2]",
    "1,2",
    "${seed}",
    "${oc.env:HOME}",
    "${nothing}",
    "'",
    "???",
    "null",
    "\\",
    "=",
    "a=b=c",
]
said = st.one_of(words, st.sampled_from(GRAMMAR))


@st.composite
def argvs(draw: st.DrawFn, verbs: list[str]) -> list[str]:
    """A verb with words and options in any order."""
    verb = draw(st.sampled_from(verbs))
    usual, options = VERBS[verb]
    found = [*usual]
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.integers(0, 2))
        if kind == 0 and options:
            found.append(f"--{draw(st.sampled_from(options))}={draw(said)}")
        elif kind == 1 and found:
            found[draw(st.integers(0, len(found) - 1))] = draw(said)
        else:
            found.insert(draw(st.integers(0, len(found))), draw(said))
    if verb in ("train", "precompute", "compare", "search"):
        found.append(f"{draw(st.sampled_from(KEYS))}={draw(said)}")
        found += usual[:1]  # what stops it in any case
    return [verb, *found] if verb else found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to sample from."""
    return checkpoint.export(get_backbone("dit").tiny(), tmp_path_factory.mktemp("tiny") / "tiny", card={"name": "t"})


def _said(argv: list[str], tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(here)
    monkeypatch.delenv("DIFFRATIO_DEBUG", raising=False)
    stands = {"TINY": str(tiny), "RUN": str(here / "run"), "--out=OUT": f"--out={here / 'out'}"}
    answered(capsys, [stands.get(word, word) for word in argv])


FAST = ["ls", "show", "sample", "export", "bench", "measure", "doctor", "--help", ""]
COMPOSED = ["train", "precompute", "compare", "search"]


@fuzzed(25, 400, argvs(FAST))
def _words(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, argv: list[str]) -> None:
    _said(argv, tiny, tmp_path, monkeypatch, capsys)


@fuzzed(6, 150, argvs(COMPOSED))
def _overrides(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, argv: list[str]) -> None:
    _said(argv, tiny, tmp_path, monkeypatch, capsys)


@fuzzed(6, 250, st.sampled_from(KEYS), said)
def _checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, key: str, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFRATIO_DEBUG", raising=False)
    answered(capsys, ["check", "fashion_diffcr", f"{key}={value}", "--json"])


test_words, test_many_words = _words
test_overrides, test_many_overrides = _overrides
test_checked, test_many_checked = _checked
