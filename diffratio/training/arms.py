"""Trains the arms of a comparison, all alike: one experiment, equal steps, data order, optimizer and distillation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError
from diffratio.training.run import CONFIG_FILE, RESULT_FILE, check, compose, plain_config, read_config, train

CONTROL = "dense_finetuned"
# change no weight (of a run whose numbers stay finite)
_FREE = (
    "paths",
    "ckpt_path",
    "trainer.enable_progress_bar",
    "trainer.devices",
    "trainer.num_nodes",
    "callbacks.pictures_every",
    "callbacks.nonfinite",
    "callbacks.max_skipped",
)


@dataclass(frozen=True)
class ArmRun:
    """One training that a comparison needs.

    Args:
        name: of the arm; the dense control is `dense_finetuned`.
        budget: fraction of the dense run's MACs.
        seed: of data order, noise and routers.
        folder: the run folder.
        config: the composed train config.
    """

    name: str
    budget: float
    seed: int
    folder: Path
    config: Any

    @property
    def export(self) -> Path:
        """Where the trained checkpoint goes."""
        return self.folder / "export"

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and exported."""
        return (self.folder / RESULT_FILE).is_file() and (self.export / "card.json").is_file()


def arm_runs(cfg: Mapping[str, Any], methods: Sequence[str]) -> list[ArmRun]:
    """What is to be trained for a comparison: the dense control and every method at every budget, for every seed.

    Args:
        cfg: composed `compare` config as plain data.
        methods: what is fine-tuned, by name.

    Raises:
        DiffratioError: an experiment or override that does not compose or check, other data than the comparison's, or
            a run folder of other settings.
    """
    arms = [] if cfg["finetuned"] else [(CONTROL, "dense", 1.0)]
    arms += [(method, method, budget) for budget in cfg["budgets"] for method in methods]
    runs = []
    for seed in cfg["seeds"]:
        for name, method, budget in arms:
            folder = Path(cfg["paths"]["output_dir"]) / "runs" / f"{name}-{100 * budget:g}-s{seed}"
            config = compose("train", _overrides(cfg, method, budget, seed, folder))
            if seed == cfg["seeds"][0]:
                check(config)
            run = ArmRun(name, budget, seed, folder, config)
            _check_data(cfg, plain_config(config))
            _check_same(run)
            runs.append(run)
    return runs


def train_arms(runs: Sequence[ArmRun]) -> None:
    """Trains what is not finished; an interrupted run resumes from its last checkpoint."""
    todo = [run for run in runs if not run.finished]
    for number, run in enumerate(todo, 1):
        print(
            f"training {run.name} at {run.budget:g}, seed {run.seed} ({number} of {len(todo)}): {run.folder}",
            file=sys.stderr,
            flush=True,
        )
        train(run.config)


def _overrides(cfg: Mapping[str, Any], method: str, budget: float, seed: int, folder: Path) -> list[str]:
    return [
        f"experiment={cfg['train_experiment']}",
        f"method={method}",
        *([f"method.schedule={_quoted(cfg['map'] or cfg['weights'])}"] if method == "measured" else []),
        *cfg["train_overrides"],
        f"backbone.source={_quoted(cfg['weights'])}",
        f"budget.target={budget}",
        f"budget.steps={cfg['steps']}",
        f"budget.guidance={str(cfg['guidance_scale'] > 1).lower()}",
        f"trainer.max_steps={cfg['train_steps']}",
        "trainer.devices=1",  # several of them would each run the whole comparison
        "trainer.num_nodes=1",
        f"trainer.enable_progress_bar={str(sys.stderr.isatty()).lower()}",
        f"seed={seed}",
        f"paths.output_dir={_quoted(str(folder))}",
        "ckpt_path=last",
    ]


def _quoted(text: str) -> str:
    """A value that Hydra's grammar leaves alone."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def _check_data(cfg: Mapping[str, Any], train_cfg: Mapping[str, Any]) -> None:
    here, there = cfg["data"]["source"], train_cfg["data"]["source"]
    if here != there:
        raise DiffratioError(
            f"train_experiment={cfg['train_experiment']} trains on data.source={there!r} and the comparison judges by "
            f"{here!r}; add 'data.source={here}' to train_overrides=['...']"
        )


def _check_same(run: ArmRun) -> None:
    """A started run goes on only with the settings that it was begun with."""
    file = run.folder / CONFIG_FILE
    if not file.is_file():
        return
    before = _flat(read_config(file))
    now = _flat(plain_config(run.config))
    for key in {**before, **now}:
        if not key.startswith(("hydra.", *_FREE)) and before.get(key) != now.get(key):
            raise DiffratioError(
                f"{str(run.folder)!r} was begun with {key}={before.get(key)!r}, now it is {now.get(key)!r}; "
                "choose another paths.output_dir"
            )


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
