"""One of two processes of a comparison; run with the folder of the checkpoints, the output folder and what breaks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from comparing import DATA, light, settings

from diffratio.errors import DiffratioError, ReportedElsewhere
from diffratio.evaluation.compare import compare_from_config, measuring, running


def main(folder: Path, out: Path, breaks: str) -> int:
    """0 when it ran, 2 when it says what went wrong, 3 when the other process says it."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        light(patch, out)
        if breaks == "loading" and rank == 1:
            patch.setattr(running, "line_up", fail)
        if breaks == "keeping" and rank == 0:
            patch.setattr(measuring.Referee, "take_dense", fail)
        if breaks == "writing" and rank == 0:
            patch.setattr(measuring.Referee, "record", fail)
        checkpoints = {name: str(folder / name) for name in ("dense", "tuned", "routed")}
        try:
            answer = compare_from_config(settings(checkpoints, out, routed=[checkpoints["routed"]]), DATA.held_out)
        except ReportedElsewhere:
            return 3
        except (DiffratioError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
    assert bool(answer) == (rank == 0)
    return 0


def fail(*arguments: object, **options: object) -> None:
    """What breaks."""
    raise OSError("the disk is full")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
