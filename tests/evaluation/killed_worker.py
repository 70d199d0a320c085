"""A comparison in a process of its own, to be killed.

Run with the folder of the checkpoints, the output folder and, for one that waits in its second record, `halt`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparing import DATA, light, settings

from diffratio import cli
from diffratio.evaluation.compare import compare_from_config
from diffratio.evaluation.compare.measuring import Referee

CHANGES: dict[str, Any] = {"seeds": [0, 1, 2, 3, 4], "budgets": [0.9, 0.8], "validation_n": 0}


def main(folder: Path, out: Path, halt: bool) -> int:
    """The verb's exit code."""
    torch.set_num_threads(1)
    checkpoints = {name: str(folder / name) for name in ("dense", "tuned", "routed")}

    def verb(args: object) -> cli.Answer:
        return cli.Answer(compare_from_config(settings(checkpoints, out, **CHANGES), DATA.held_out))

    with pytest.MonkeyPatch.context() as patch:
        light(patch, out)
        if halt:
            patch.setattr(Referee, "record", waiting(Referee.record))
        patch.setattr(cli, "_parse", lambda argv: SimpleNamespace(function=verb, json=False, debug=False))
        return cli.main([])


def waiting(record: Any) -> Any:
    """The same, but the second call waits to be ended."""
    calls = 0

    def one(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            time.sleep(120)
        return record(*arguments)

    return one


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), "halt" in sys.argv[3:]))
