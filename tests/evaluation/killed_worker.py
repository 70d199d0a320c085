"""A comparison in a process of its own, to be killed; run with the folder of the checkpoints and the output folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparing import DATA, light, settings

from diffratio import cli
from diffratio.evaluation.compare import compare_from_config

CHANGES: dict[str, Any] = {"seeds": [0, 1, 2, 3, 4], "budgets": [0.9, 0.8], "validation_n": 0}


def main(folder: Path, out: Path) -> int:
    """The verb's exit code."""
    torch.set_num_threads(1)
    checkpoints = {name: str(folder / name) for name in ("dense", "tuned", "routed")}

    def verb(args: object) -> cli.Answer:
        return cli.Answer(compare_from_config(settings(checkpoints, out, **CHANGES), DATA.held_out))

    with pytest.MonkeyPatch.context() as patch:
        light(patch, out)
        patch.setattr(cli, "_parse", lambda argv: SimpleNamespace(function=verb, json=False, debug=False))
        return cli.main([])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
