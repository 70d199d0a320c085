"""Coverage-guided fuzzing of one reader: `python tests/fuzz/guided.py KIND FOLDER -runs=20000` (needs atheris).

What is drawn are bytes, from the document that the reader is made for, towards what reaches new lines of this package.
It ends with an error at the first input that is neither read nor refused in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["diffratio"]):
    import torch
    from safetensors.torch import save_file
    from test_documents import KINDS

    from diffratio.checkpoint.weights import read_weights
    from diffratio.errors import DiffratioError
    from diffratio.training.run import read_config

WORDS = ["null", "true", "-1", "0.5", "1e999", "NaN", "[]", "{}", "..", "2147483648", '"name"', ":", ",", "!!python"]


def target(kind: str, folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    """The file to write and what reads its folder; a good one lies there already."""
    if kind == "weights":
        path = folder / "w.safetensors"
        save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, path)
        return path, lambda _: read_weights(path)
    if kind == "config":
        path = folder / "config.yaml"
        path.write_text("name: x\nmethod: {name: diffcr, regions: 4}\nbudget:\n  target: 0.8\nbetas: [0.9, 0.99]\n")
        return path, lambda _: read_config(path)
    document, name, read = KINDS[kind]
    import json

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(folder)))
    return path, read


def main() -> None:
    """Fuzzes until libFuzzer's bounds are reached."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    path, read = target(kind, folder)
    read(folder)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "good").write_bytes(path.read_bytes())
    words = folder / "words.txt"
    words.write_text("".join('"' + "".join(f"\\x{ord(one):02x}" for one in word) + '"\n' for word in WORDS))

    def one(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            read(folder)
        except DiffratioError as error:
            assert "\n" not in str(error), f"more than one line: {error!r}"
            assert len(str(error)) < 2200, "a message without end"

    atheris.Setup(
        [sys.argv[0], f"-dict={words}", f"-artifact_prefix={folder}/", "-max_len=8192", *sys.argv[3:], str(corpus)], one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
