"""A job from its config: compose, check, train, export. The only room below the entry points that knows Hydra."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffratio.errors import DiffratioError, RunFailed, Terminated, first_line, unknown
from diffratio.files import atomic_file, configs_folder, read_text, writable_folder, write_json
from diffratio.plain import typed

_LARGEST_CONFIG, _DEEPEST = 1 << 20, 32  # bytes; mappings and lists inside each other
_PLACES = ("backbone.source", "data.source", "paths.output_dir", "ckpt_path", "weights", "parts", "out", "vae", "map")
CONFIG_FILE, RESULT_FILE = "config.yaml", "result.json"
# warnings about what is so on purpose: data of our own that resumes, folders that hold a run, blocks that return views
# (nothing is done in place on them)
_EXPECTED = (
    ".*not resumable.*|.*does not have many workers.*|.*__len__.*|.*LeafSpec.*|.*exists and is not empty.*|"
    ".*returned a view tensor.*"
)


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Composes a config from the tree and Hydra overrides.

    Raises:
        DiffratioError: an unknown group member or key (the nearest names are given), or an override that does not
            parse.
    """
    overrides = [_of_verb(config_name, one) for one in overrides]
    _check_overrides(config_name, overrides)
    try:
        return _compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last of a group without a name
        raise DiffratioError(f"config {config_name!r}: {_reason(error)}") from None


def _of_verb(config_name: str, override: str) -> str:
    """`debug=cpu` means the file of the verb, where it has one of its own: `debug/cpu_compare.yaml`."""
    key, _, value = override.partition("=")
    own = f"{value}_{config_name}"
    return f"debug={own}" if key == "debug" and (configs_folder() / "debug" / f"{own}.yaml").is_file() else override


def _reason(error: BaseException) -> str:
    return first_line(error.__cause__ or error)  # Hydra wraps what OmegaConf says


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs_folder().resolve()), version_base="1.3"):
        return hydra_compose(config_name, overrides)


def _check_overrides(config_name: str, overrides: Sequence[str]) -> None:
    """Finds the first override that names nothing, before Hydra's long error does."""
    folder = configs_folder()
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise DiffratioError(f"override does not parse: {_reason(error)}; write key=value") from None
    groups: list[str] = []
    values: list[tuple[str, str]] = []
    for override in parsed:
        key = override.key_or_group
        if override.is_sweep_override():
            raise DiffratioError(
                f"{override.input_line}: several values need a multirun: python train.py -m {override.input_line}"
            )
        if (folder / key).is_dir():
            groups.append(str(override.input_line))
            known = [path.stem for path in (folder / key).glob("*.yaml")]
            value = override.value()
            if value is not None and str(value) not in known:
                raise unknown(key, value, known)
        elif not override.is_add() and not override.is_delete() and not key.startswith("hydra"):
            values.append((key, str(override.input_line)))
    try:
        base = _compose(config_name, groups)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last of a group without a name
        raise DiffratioError(f"config {config_name!r}: {_reason(error)}") from None
    keys = _flat(OmegaConf.to_container(base, resolve=False))
    for key, line in values:
        if key not in keys:
            try:
                raise unknown("config key", key, keys)
            except DiffratioError as error:
                short = str(error).split("known are")[0].strip().rstrip(":?").strip()
                raise DiffratioError(f"{short}? ({line}); `diffratio show EXPERIMENT` prints every key") from None


def _flat(document: Any, prefix: str = "") -> set[str]:
    keys = set()
    if isinstance(document, dict):
        for key, value in document.items():
            keys |= {f"{prefix}{key}"} | _flat(value, f"{prefix}{key}.")
    return keys


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Plain, resolved data of a config; a missing mandatory value is a DiffratioError."""
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise DiffratioError(f"config: {missing[0]} has no value; give it as {missing[0]}=value")
        plain = composed(cfg)
    except OmegaConfBaseException as error:
        raise DiffratioError(f"config: {_reason(error)}") from None
    for path in _PLACES:
        value: Any = plain
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and path == "paths.output_dir" and "paths" in plain:
            raise DiffratioError(f"config: {path} has no value; give it as {path}=NAME")
        if not isinstance(value, str | None) or value == "":
            meant = f"./{value}" if isinstance(value, int | float) else "NAME"
            raise DiffratioError(f"config: {path} is {value!r}; it takes a name or a folder, {path}={meant}")
    return plain


def composed(cfg: DictConfig) -> dict[str, Any]:
    """Plain, resolved data of a config as its files have it: `???` where a value is missing."""
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    return plain  # type: ignore[return-value]


def check(cfg: DictConfig, sensitivity: str | None = None, verify: int = 0) -> dict[str, Any]:
    """Validates an experiment without training, and without weights where no sensitivity map is given.

    Args:
        cfg: composed `train` config.
        sensitivity: a map that `diffratio measure` wrote: what the budget will cost in quality, before any training.
        verify: held-out images on which the map's predictions are measured; 0 is off.

    Returns:
        The reachable budgets, MACs by bin (and milliseconds, where the budget counts them), parameters, a memory
        estimate in MiB and predicted errors.
    """
    import torch

    from diffratio import surgery
    from diffratio.backbones import backbone_of
    from diffratio.cost.macs import macs_table
    from diffratio.methods.base import get_method
    from diffratio.routing.schedule import constant_table
    from diffratio.training.build import (
        budget_costs,
        budget_run,
        budget_table,
        build_data,
        build_method,
        build_objective,
        build_transformer,
        lora_settings,
    )
    from diffratio.training.schedules import predicted_errors
    from diffratio.training.settings import BudgetSettings, LossSettings, OptimizerSettings, callback_settings
    from diffratio.training.trainer import check_trainer

    plain = plain_config(cfg)
    budget = typed(BudgetSettings, plain["budget"], "budget")
    typed(OptimizerSettings, plain["optimizer"], "optimizer")
    typed(LossSettings, {k: plain["objective"][k] for k in ("timesteps", "distill")}, "objective")
    callback_settings(plain)
    check_trainer(plain)
    named = plain["data"].get("source") is not None  # an experiment for a user's own data names none yet
    data = build_data(plain) if named else None
    with torch.device("meta"):
        transformer = build_transformer(plain, data, weights=False)
    backbone = backbone_of(transformer)
    method = build_method(plain, transformer, budget)
    description = backbone.describe(transformer)
    run = budget_run(plain, transformer, budget)
    macs, costs = macs_table(description, run), budget_costs(transformer, budget, run)
    lowest = costs.fraction(constant_table(description.layers, 1, costs.levels[0]))
    if get_method(method.method.name).learned and budget.target < lowest:
        raise DiffratioError(
            f"budget.target={budget.target:g} is below the {lowest:.3f} that every bin at {costs.levels[0]} costs"
        )
    parameters = trained = sum(p.numel() for p in transformer.parameters())
    lora = lora_settings(plain)
    if lora:
        with torch.device("meta"):
            surgery.add_lora_(transformer, lora)
        trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    batch, tokens = plain["data"]["batch_size"], run.grid.tokens
    # weights in fp32, of trained ones gradients, two Adam moments and the average; activations of 34 channels a block
    state = 4 * (parameters + 4 * trained + (trained if lora else 0))
    # checkpointed blocks keep their inputs, and one block at a time everything
    kept = 2 * description.layers + 34 if plain["backbone"]["gradient_checkpointing"] else 34 * description.layers
    activations = batch * tokens * description.width * kept * 2
    table, milliseconds = budget_table(transformer, budget, run), {}
    if table is not None:
        milliseconds["milliseconds"] = {
            "device": table.device,
            "batch": table.batch,
            "dense_forward": costs.dense,
            "dense_run": table.run_ms(run),
            "block_by_bin": list(costs.cells[0]),
            "allowed_bins": list(costs.allowed_bins),
        }
    predicted = {}
    if sensitivity:
        if data is None:
            raise DiffratioError("--map predicts for an experiment with data: give data.source")
        weights = build_transformer(plain, data)
        held_out = (*data.held_out(verify), build_objective(plain), data.conditions) if verify else None
        errors = predicted_errors(sensitivity, method, weights, run, budget.target, held_out)
        predicted = {"predicted_error": errors}
    elif verify:
        raise DiffratioError("--verify measures what a sensitivity map predicts; give the map too: --map FILE")
    return {
        "experiment": plain["name"],
        "method": method.method.name,
        "tokens": tokens,
        "layers": description.layers,
        "parameters": parameters,
        **({"lora_parameters": trained} if lora else {}),
        "budget": {"target": budget.target, "unit": budget.unit, "reachable": [lowest, 1.0]},
        "macs": {
            "dense_forward": description.dense(run) // (run.steps * run.halves),
            "dense_run": description.dense(run),
            "block_by_bin": [int(value) for value in macs.cells[0]],
        },
        **milliseconds,
        "memory_mib": {"state": round(state / 2**20), "activations": round(activations / 2**20)},
        **predicted,
    }


def measure(cfg: DictConfig, out: str, settings: Any) -> dict[str, Any]:
    """Measures the dense model of an experiment and writes its sensitivity map.

    Args:
        cfg: composed `train` config; backbone, data, objective, run and seed of it are used.
        out: file to write.
        settings: a `sensitivity.MeasureSettings`.

    Returns:
        The file, what it holds, and the schedule and predicted error at a few budgets.
    """
    import sys

    from diffratio.sensitivity import measure_sensitivity, save_sensitivity
    from diffratio.training.build import budget_run, build_data, build_objective, build_transformer
    from diffratio.training.schedules import along
    from diffratio.training.settings import BudgetSettings

    if Path(out).suffix != ".safetensors":
        raise DiffratioError(f"--out {out!r}: give a name that ends in .safetensors")
    writable_folder(Path(out).parent)
    plain = plain_config(cfg)
    data = build_data(plain)
    objective = build_objective(plain)
    budget = typed(BudgetSettings, plain["budget"], "budget")
    transformer = build_transformer(plain, data)
    started = time.perf_counter()
    found = measure_sensitivity(
        transformer,
        *data.reference(settings.n),
        objective,
        budget_run(plain, transformer, budget),
        settings,
        lambda line: print(line, file=sys.stderr, flush=True),
        data.conditions,
    )
    save_sensitivity(out, found)
    seconds = round(time.perf_counter() - started, 1)
    return {"out": out, "n": found.n, "ranking": found.ranking, "seconds": seconds, **along(found, transformer)}


def train(cfg: DictConfig) -> dict[str, Any]:
    """Trains, freezes, exports; resumes with `ckpt_path=last`.

    Returns:
        What `result.json` in the run folder holds; nothing on the further processes of `trainer=fsdp2`.

    Raises:
        DiffratioError: bad settings, or a run folder that holds another run.
        RunFailed: the numbers overflowed, the disk is full, or processes would go on from different states.
        Terminated: SIGTERM came; the message names the checkpoint to go on from.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from diffratio.data.latents import LatentData
    from diffratio.sampling.processes import leave_group_at_exit
    from diffratio.training.build import build_data, build_module
    from diffratio.training.callbacks import WeightAverage
    from diffratio.training.latency import keep_table, with_own_table
    from diffratio.training.processes import APART, check_alike, ending_together, release, under_srun
    from diffratio.training.saving import LAST, present, read_resumable, resumable
    from diffratio.training.trainer import build_trainer

    plain = plain_config(cfg)
    started = time.perf_counter()
    folder = Path(plain["paths"]["output_dir"])
    resume: Path | None = None
    if plain["ckpt_path"] == "last":
        resume = resumable(folder)
    elif plain["ckpt_path"]:
        resume = Path(plain["ckpt_path"])
        if not resume.is_file():
            raise DiffratioError(f"ckpt_path={plain['ckpt_path']!r} is no file; `last` resumes the run folder")
        read_resumable(resume)
    elif present(folder):
        raise DiffratioError(
            f"run folder {str(folder)!r} holds a run already; resume it with ckpt_path=last, "
            "or choose another paths.output_dir"
        )
    if resume is not None:
        plain = with_own_table(plain, folder)
    data = build_data(plain)
    module = build_module(plain, data)
    for loader in (data.train_dataloader, data.val_dataloader):  # a damaged picture shows before anything is written
        loader()
    if isinstance(data, LatentData):
        data.coder()  # that the run's pictures need at its end
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = build_trainer(plain, folder, module.optimizer_settings, resume)
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping and trainer.world_size > 1 and not under_srun():  # each job of the launcher's is one run there
        raise DiffratioError(
            f"a multirun over {trainer.world_size} processes would start the whole sweep in each of them; set "
            "trainer.devices=1, start one run for each setting, or queue them with hydra/launcher=slurm and "
            "hydra.launcher.tasks_per_node equal to trainer.devices"
        )
    if getattr(rank_zero_only, "rank", 0) == 0:
        with atomic_file(writable_folder(folder) / CONFIG_FILE) as path:
            path.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        keep_table(plain, folder)
    with ending_together(trainer), _in_order(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_EXPECTED)
        trainer.fit(module, datamodule=data, ckpt_path=str(resume) if resume else None, weights_only=True)
        if module.learning_ratios:  # stopped early, by trainer.max_time
            if not module.sharded:
                module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            module.freeze_schedule(trainer.global_step)
        release(trainer)  # from here on a process may end with a code of its own
        check_alike(trainer, "the keep schedule", getattr(module.method, "bins", None), APART)
        trainer.save_checkpoint(folder / "checkpoints" / LAST, weights_only=False)
    seconds = time.perf_counter() - started
    with ending_together(trainer), _in_order(folder):
        if module.sharded:  # too large for one process to train, not to hold: it takes what was saved
            result = _finish_sharded(plain, trainer, folder, seconds)
        else:
            for callback in cast(Any, trainer).callbacks:
                if isinstance(callback, WeightAverage):
                    callback.swap_in(module)
            result = _finish(plain, module, trainer, folder, seconds)
        if trainer.is_global_zero:
            write_json(folder / RESULT_FILE, result)
    if trainer.world_size > 1:
        leave_group_at_exit()
    return result


@contextlib.contextmanager
def _in_order(folder: Path) -> Iterator[None]:
    """Gives what ends a started job early its one line: SIGTERM, Ctrl-C, a disk that takes no more."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from diffratio.training.saving import last_good
    from diffratio.training.termination import way_on

    try:
        yield
    except SystemExit as stop:  # Lightning's answer to both signals
        if isinstance(stop, SIGTERMException) or isinstance(stop.__context__, Terminated):
            raise Terminated(way_on(folder)) from None
        raise KeyboardInterrupt from None
    except Terminated:
        raise Terminated(way_on(folder)) from None
    except OSError as error:
        first = error.__context__  # Lightning writes its log once more after a failure, which fails too
        while first is not None:
            if isinstance(first, DiffratioError):
                raise first from None
            first = first.__context__
        raise RunFailed(f"{error}; {last_good(folder)}: mend that and run the command again") from error


def _finish_sharded(plain: dict[str, Any], trainer: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """`_finish` on the first process, with a whole module from the last checkpoint; the others have no result.

    They do not wait: on accelerators that would be a collective, which ends them all after half an hour.
    """
    from diffratio.training.export import restored
    from diffratio.training.saving import LAST, read_resumable

    if not trainer.is_global_zero:
        return {}
    module = restored(plain, trainer.datamodule, read_resumable(folder / "checkpoints" / LAST))
    return _finish(plain, module, trainer, folder, seconds)


def _finish(plain: dict[str, Any], module: Any, trainer: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """Measures the last validation loss and exports."""
    from diffratio.training.build import budget_table
    from diffratio.training.export import card_of, export_module, export_module_adapter, final_losses
    from diffratio.training.latency import in_words, promised, reached
    from diffratio.training.settings import callback_settings

    module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    with trainer.precision_plugin.forward_context():
        parts = final_losses(module, trainer.datamodule, callback_settings(plain).final_n)
    losses = parts.pop("loss")
    names = trainer.datamodule.class_names
    cost = module.method.macs(module.run)
    result = {
        "name": plain["name"],
        "data": trainer.datamodule.name,
        "method": module.method.name,
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "class_names": names if len(names) == trainer.datamodule.num_classes else [],
        "macs_fraction": cost.fraction,
        "budget": plain["budget"]["target"],
        "budget_unit": module.budget.unit,
        "budget_fraction": module.costs.fraction(module.method.bins) if hasattr(module.method, "bins") else 1.0,
        "schedule": [list(row) for row in getattr(module.method, "bins", ())] or None,
        "rounding": module.rounding or None,
        "val_loss": float(losses.mean()),
        "val_loss_regions": [float(value) for value in losses.mean(0)],
        **({"val_loss_parts": {part: float(own.mean()) for part, own in parts.items()}} if parts else {}),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "export": str(folder / "export"),
    }
    table = budget_table(module.transformer, module.budget, module.run)
    if table is not None:
        result["latency"] = promised(module, table)
    if trainer.is_global_zero:
        card = card_of(plain, result, module.conditions)
        if module.base is not None:  # small beside the merged one
            result["adapter"] = str(export_module_adapter(module, folder / "adapter", card))
        exported = export_module(module, folder / "export", card)
        if table is not None:
            result["latency"] |= reached(exported, module, table, str(trainer.strategy.root_device))
            print(in_words(result["latency"]))
    return result


def read_config(path: Path) -> dict[str, Any]:
    """The config of a run that was begun, as plain data: nothing in it is resolved, and it repeats nothing.

    Raises:
        DiffratioError: not a config, or one with aliases, which a few lines multiply without end; names the file.
    """
    text = read_text(path, "config of the run", _LARGEST_CONFIG)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
                raise ValueError("it has aliases" if depth <= _DEEPEST else "it is nested too deeply")
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # YAML's and OmegaConf's error types share no base
        raise DiffratioError(f"config {str(path)!r} cannot be read ({_reason(error)})") from None
    if not isinstance(plain, dict):
        raise DiffratioError(f"config {str(path)!r} holds no settings")
    return plain  # type: ignore[return-value]


def export_run(run_folder: str, out: str, dtype: str | None = None, adapter: bool = False) -> dict[str, Any]:
    """Exports a run from its last checkpoint, moving average first; LoRA merged, or with routers and schedule alone.

    Raises:
        DiffratioError: the folder holds no run, its ratios are not frozen yet, or it has no adapter.
    """
    from diffratio.training.export import export_checkpoint

    folder = Path(run_folder)
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise DiffratioError(
            f"{run_folder!r} is no run folder (it has no {CONFIG_FILE}); give the folder that train wrote"
        )
    return export_checkpoint(read_config(config), folder, Path(out), dtype, adapter)
