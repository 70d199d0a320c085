"""Lightning's Trainer of a job: loggers, precision, callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from diffratio.errors import DiffratioError, shortened, unknown
from diffratio.plain import switches
from diffratio.training.callbacks import Pictures, RatioLog, Throughput, WeightAverage
from diffratio.training.health import RoutingHealth
from diffratio.training.logs import RunCSVLogger, RunWandbLogger
from diffratio.training.processes import SameStart, check_processes, check_started, cluster_plugins, strategy_of
from diffratio.training.saving import SafeCheckpointIO
from diffratio.training.settings import MOST_STEPS, Config, OptimizerSettings, callback_settings
from diffratio.training.sharding import ShardedStrategy
from diffratio.training.termination import Termination

_SWITCHES = (
    "detect_anomaly",
    "enable_progress_bar",
    "enable_model_summary",
    "inference_mode",
    "use_distributed_sampler",
    "sync_batchnorm",
)  # of Lightning's trainer, which takes any value for one of the two


def build_logger(cfg: Config, folder: Path) -> Any:
    """CSV, TensorBoard or wandb."""
    from lightning.pytorch import loggers

    settings = dict(cfg["logger"])
    name = settings.pop("name")
    if name == "csv":
        return RunCSVLogger(folder)
    if name == "tensorboard":
        try:
            return loggers.TensorBoardLogger(folder, name="logs", version="")
        except ModuleNotFoundError:
            raise DiffratioError("logger=tensorboard needs TensorBoard: pip install diffratio[tensorboard]") from None
    if name == "wandb":
        return RunWandbLogger(folder, name=cfg["name"], **settings)
    raise unknown("logger", name, ("csv", "tensorboard", "wandb"))


def best_precision(accelerator: str) -> str:
    """bf16 where the hardware multiplies it, fp32 elsewhere: an AVX2 processor is 200 times slower in bf16."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def check_trainer(cfg: Config) -> None:
    """Checks what `build_trainer` would hand to Lightning, which waits for the first step with it.

    Raises:
        DiffratioError: a number of steps or nodes that is none, or a switch that is neither on nor off.
    """
    switches(cfg["trainer"], "trainer", _SWITCHES)
    for key in ("max_steps", "val_check_interval", "accumulate_grad_batches", "log_every_n_steps", "num_nodes"):
        value = cfg["trainer"][key]
        if type(value) is not int or not 1 <= value <= MOST_STEPS:
            raise DiffratioError(
                f"trainer.{key} {shortened(value)} must be an integer of at least 1 and at most {MOST_STEPS:,}"
            )


def build_trainer(cfg: Config, folder: Path, optimizer: OptimizerSettings, resumed: Path | None = None) -> Trainer:
    """Lightning's Trainer with our callbacks."""
    check_trainer(cfg)
    settings, callbacks = dict(cfg["trainer"]), callback_settings(cfg)
    chosen: list[Any] = []
    if optimizer.ema:
        chosen.append(WeightAverage(optimizer.ema))
    chosen += [
        SameStart(resumed.name if resumed else None),
        Throughput(),
        RatioLog(folder, callbacks.ratios_every),
        RoutingHealth(callbacks.ratios_every),
        Pictures(folder, callbacks.pictures_every, callbacks.pictures_n, cfg["budget"]["steps"]),
        Termination(folder),
        ModelCheckpoint(
            dirpath=folder / "checkpoints",
            filename="last",
            enable_version_counter=False,
            every_n_train_steps=callbacks.checkpoint_every or settings["max_steps"],
        ),
    ]
    if settings["enable_progress_bar"]:
        chosen.append(TQDMProgressBar(refresh_rate=max(1, settings["log_every_n_steps"] // 2)))
    if settings["precision"] == "auto":
        settings["precision"] = best_precision(settings["accelerator"])
    check_processes(settings, optimizer)
    plugins: list[Any] = [SafeCheckpointIO()]
    settings["strategy"] = strategy_of(settings["strategy"])
    if isinstance(settings["strategy"], ShardedStrategy) and settings["precision"] == "bf16-mixed":
        # Lightning refuses the name with FSDP2 and takes the plugin: autocast, as in one process
        device = "cpu" if settings["accelerator"] == "cpu" or not torch.cuda.is_available() else "cuda"
        plugins.append(MixedPrecision("bf16-mixed", device))
        del settings["precision"]
    if isinstance(settings["strategy"], ShardedStrategy):
        settings["inference_mode"] = False  # the average of sharded weights is put aside, which needs their versions
    # a validation interval beyond the end would never come: validate once, at the end
    settings["val_check_interval"] = min(settings["val_check_interval"], settings["max_steps"])
    settings["val_check_interval"] *= settings["accumulate_grad_batches"]
    logger = build_logger(cfg, folder)
    try:
        plugins += cluster_plugins()
        trainer = Trainer(
            **settings,
            check_val_every_n_epoch=None,
            logger=logger,
            callbacks=chosen,
            default_root_dir=folder,
            plugins=plugins,
        )
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise DiffratioError(f"trainer: {' '.join(str(error).split())}; mend the keys of trainer") from None
    check_started(trainer)
    return trainer
