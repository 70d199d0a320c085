"""Hydra entry: python train.py experiment=fashion_diffcr budget.target=0.8 (the same as `diffratio train`)."""

import sys

import hydra
from omegaconf import DictConfig

from diffratio.errors import DiffratioError, ReportedElsewhere, Terminated, speaks
from diffratio.training.run import train


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Trains; bad input is one line and exit code 2, a failure 1, SIGTERM 143."""
    try:
        train(cfg)
    except (DiffratioError, Terminated) as error:
        silent = isinstance(error, ReportedElsewhere) or (isinstance(error, Terminated) and not speaks())
        if not silent:  # one of several processes says it
            print(f"diffratio: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
