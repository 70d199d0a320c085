"""Runs every arm on the same weights, noise and labels, and leaves one record each, then the report."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.checkpoint import load_pipeline, read_card, resolve
from diffratio.cost.latency import interleaved
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.evaluation.features import FeatureExtractor, Lite0Features
from diffratio.evaluation.metrics import METRICS, Evidence, efficiency, measure, require_samples
from diffratio.evaluation.records import Arm, Record, provenance, write_record
from diffratio.evaluation.report import write_report
from diffratio.files import atomic_file, sha256, writable_folder
from diffratio.methods.base import MethodConfig, check_budget, config_to_json, get_method
from diffratio.methods.dense import Dense
from diffratio.methods.fewer_steps import FewerSteps
from diffratio.objectives import get_objective
from diffratio.objectives.validation import region_losses
from diffratio.sampling.generate import balanced_labels, generate, sample_grid
from diffratio.sampling.schedulers import noise_levels, set_steps

REGIONS = 4
GRID = 40


@dataclass(frozen=True)
class CompareSettings:
    """What `configs/compare.yaml` holds, beside data and paths; see there for the meanings."""

    name: str
    weights: str
    methods: tuple[str, ...]
    routed: tuple[str, ...]
    finetuned: str | None
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    n: int
    steps: int
    guidance_scale: float
    batch_size: int
    reference_n: int
    validation_n: int
    latency_batches: tuple[int, ...]
    latency_repeats: int
    block_repeats: int
    device: str

    def __post_init__(self) -> None:
        for budget in self.budgets:
            check_budget(budget)
        require_samples("kid_lite0", self.n)
        if not self.budgets or not self.seeds:
            raise DiffratioError("compare needs at least one budget and one seed: budgets=[0.8] seeds=[0]")
        for method in self.methods:
            if get_method(method).learned:
                raise DiffratioError(
                    f"methods: {method!r} is learned, so it needs trained weights: train it "
                    f"(diffratio train method={method}), then give its export in routed=[...]"
                )

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> CompareSettings:
        """From plain data; lists become tuples.

        Raises:
            DiffratioError: a value of another type.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = cfg[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
            wanted = {"int": int, "str": str, "float": (int, float)}.get(str(field.type))
            if wanted and (not isinstance(value, wanted) or isinstance(value, bool)):  # type: ignore[arg-type]
                raise DiffratioError(f"{field.name}={value!r}: it takes one {field.type}")
            if str(field.type).startswith("tuple") and not isinstance(value, list):
                raise DiffratioError(f"{field.name}={value!r}: it takes a list, {field.name}=[...]")
        return cls(**values)


@dataclass
class Contender:
    """One arm, ready to run, or the reason why it is not."""

    arm: Arm
    budget: float
    pipe: Any = None
    run: SamplingRun | None = None
    cost: Any = None
    steps: int = 0
    error: DiffratioError | None = None

    @property
    def schedule(self) -> dict[str, Any] | None:
        """The keep schedule of a routed arm."""
        bins = getattr(self.method, "bins", None)
        return {"bins": [list(row) for row in bins]} if bins else None

    @property
    def method(self) -> Any:
        """The attached method, or None for the plain dense model."""
        transformer = self.pipe.transformer
        return surgery.attachment(transformer).token_method if surgery.is_applied(transformer) else None


def compare_from_config(
    cfg: Mapping[str, Any],
    held_out: Callable[[int], tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """Runs a comparison.

    Args:
        cfg: composed `compare` config as plain data.
        held_out: n -> held-out images (n, C, H, W) in [-1, 1] and labels (n,).

    Returns:
        Paths of the report and a row of key figures an arm.

    Raises:
        DiffratioError: bad settings, or an output folder that holds records already.
    """
    settings = CompareSettings.from_config(cfg)
    folder = Path(cfg["paths"]["output_dir"])
    if any((folder / "records").glob("*.json")):
        raise DiffratioError(f"{str(folder)!r} holds a comparison already; choose another paths.output_dir")
    device = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    extractor = Lite0Features(device=device)
    contenders = _contenders(settings, device)
    writable_folder(folder)  # not before everything else is known to be sound
    _say(f"{len(contenders)} arms x {len(settings.seeds)} seeds, {settings.n} samples each, {settings.steps} steps")
    latency = _latency(settings, contenders, device)
    images, _ = held_out(settings.reference_n)
    real = extractor.extract(images)
    losses = _losses(settings, contenders, held_out, device)
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        dense: Evidence | None = None
        for index, contender in enumerate(contenders):
            record, samples = _measure(
                settings, contender, seed, folder, extractor, real, dense, losses[index], losses, latency.get(index)
            )
            if index == 0:
                dense = samples
                if seed == settings.seeds[0] and settings.block_repeats:
                    record = dataclasses.replace(record, extra={"block": _block(settings.block_repeats, device)})
            write_record(folder, record)
            rows.append(_row(record))
    report = write_report(folder, title=f"diffratio compare: {settings.weights}")
    return {"report": str(report.html), "markdown": str(report.markdown), "csv": str(report.csv), "arms": rows}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _contenders(settings: CompareSettings, device: str) -> list[Contender]:
    """Dense first, then the fine-tuned dense, the routed checkpoints, then every method at every budget."""
    base = load_pipeline(settings.weights, device=device)
    if surgery.is_applied(base.transformer):
        raise DiffratioError(
            f"weights={settings.weights!r} is a routed checkpoint; give the dense one, and this in routed=[...]"
        )
    set_steps(base.scheduler, settings.steps)
    guidance = "cfg" if settings.guidance_scale > 1 else "none"
    grid = backbone_of(base.transformer).grid(base.transformer)
    run = SamplingRun(noise_levels(base.scheduler), grid, guidance)  # type: ignore[arg-type]
    digest = _digest(settings.weights)

    def ready(pipe: Any, arm: Arm, budget: float) -> Contender:
        contender = Contender(arm, budget, pipe)
        method = contender.method
        contender.run = method.adapt(run) if method else run
        contender.cost = surgery.macs(pipe.transformer, run=run)
        contender.steps = contender.run.steps
        return contender

    dense_json = {"name": "dense"}
    found = [ready(base, Arm("dense", settings.weights, dense_json, weights_sha256=digest), 1.0)]
    if settings.finetuned:
        tuned = load_pipeline(settings.finetuned, device=device)
        if surgery.is_applied(tuned.transformer):
            raise DiffratioError(f"finetuned={settings.finetuned!r} is a routed checkpoint; it takes a dense one")
        arm = Arm(
            "dense_finetuned",
            settings.finetuned,
            dense_json,
            True,
            _steps_of(settings.finetuned),
            _digest(settings.finetuned),
        )
        found.append(ready(tuned, arm, 1.0))
    for source in settings.routed:
        pipe = load_pipeline(source, device=device)
        if not surgery.is_applied(pipe.transformer):
            raise DiffratioError(
                f"routed: {source!r} is a dense checkpoint; routed takes what `diffratio export` wrote"
            )
        config = surgery.attachment(pipe.transformer).token_method.config
        budget = config.schedule.budget if config.schedule else 1.0
        name = _unique(config.method.name, [c.arm.name for c in found if c.budget == budget])
        arm = Arm(name, source, config_to_json(config), config.as_published, _steps_of(source), _digest(source))
        found.append(ready(pipe, arm, budget))
    for budget in settings.budgets:
        for method in settings.methods:
            if method == "dense":
                continue
            try:
                config = surgery.for_budget(method, base.transformer, budget, run=run)
            except BudgetUnreachable as error:
                arm = Arm(method, settings.weights, {"name": method}, weights_sha256=digest)
                found.append(Contender(arm, budget, error=error))
                continue
            pipe = _with_method(base, config)
            arm = Arm(method, settings.weights, config_to_json(config), config.as_published, weights_sha256=digest)
            found.append(ready(pipe, arm, budget))
    return found


def _with_method(base: Any, config: MethodConfig) -> Any:
    """A pipeline of its own with the method applied and attached."""
    pipe = copy.deepcopy(base)
    surgery.apply_(pipe.transformer, config)
    if not isinstance(config, Dense | FewerSteps):
        surgery.attach_(pipe)
    return pipe


def _unique(name: str, taken: Sequence[str]) -> str:
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique


def _digest(source: str) -> str | None:
    path = resolve(source)
    if isinstance(path, str):
        return None
    files = sorted(Path(path).rglob("*.safetensors"))
    return sha256(files[0]) if files else None


def _steps_of(source: str) -> int | None:
    path = resolve(source)
    steps = None if isinstance(path, str) else read_card(path).training.get("steps")
    return steps if isinstance(steps, int) else None


def _latency(settings: CompareSettings, contenders: list[Contender], device: str) -> dict[int, list[dict[str, Any]]]:
    """Whole sampling runs, all arms interleaved."""
    found: dict[int, list[dict[str, Any]]] = {}
    if not settings.latency_repeats:
        return found
    ready = [(index, one) for index, one in enumerate(contenders) if one.error is None]
    for batch in settings.latency_batches:
        labels = balanced_labels(
            batch, backbone_of(contenders[0].pipe.transformer).null_label(contenders[0].pipe.transformer) or 1
        )

        def sample(one: Contender, labels: list[int] = labels) -> Callable[[], object]:
            return lambda: generate(
                one.pipe, len(labels), labels=labels, batch_size=len(labels), steps=one.steps,
                guidance_scale=settings.guidance_scale, quiet=True, distributed=False,
            )  # fmt: skip

        _say(f"latency at batch {batch}: {settings.latency_repeats} interleaved sampling runs of each arm")
        times = interleaved({str(i): sample(one) for i, one in ready}, settings.latency_repeats, 1, device)
        dense = times["0"]
        for index, one in ready:
            own = times[str(index)]
            found.setdefault(index, []).append(
                {
                    "batch": batch,
                    "mode": "eager",
                    "median_ms": own.median_ms,
                    "q1_ms": own.q1_ms,
                    "q3_ms": own.q3_ms,
                    "dense_median_ms": dense.median_ms,
                    "repeats": own.repeats,
                    "efficiency": efficiency(own.median_ms, dense.median_ms, one.cost.fraction),
                }
            )
    return found


def _losses(
    settings: CompareSettings,
    contenders: list[Contender],
    held_out: Callable[[int], tuple[Tensor, Tensor]],
    device: str,
) -> list[Tensor | None]:
    """Paired validation losses (n, R) of every arm; None where steps, not the model, are what an arm changes."""
    if not settings.validation_n:
        return [None] * len(contenders)
    card = read_card(resolve(settings.weights)) if not isinstance(resolve(settings.weights), str) else None
    objective = get_objective(card.objective if card else "noise")
    images, labels = held_out(settings.validation_n)
    found: list[Tensor | None] = []
    for one in contenders:
        if one.error is not None or one.arm.method["name"] == "fewer_steps":
            found.append(None)
            continue
        transformer = one.pipe.transformer
        backbone = backbone_of(transformer)

        def predict(
            inputs: Tensor, levels: Tensor, labels: Tensor, model: Any = transformer, family: Any = backbone
        ) -> Tensor:
            timestep = objective.timestep(family.timestep(levels))
            return model(inputs, timestep=timestep, class_labels=labels, return_dict=False)[0]

        found.append(region_losses(predict, objective, images.to(device), labels.to(device), REGIONS))
    return found


def _measure(
    settings: CompareSettings,
    one: Contender,
    seed: int,
    folder: Path,
    extractor: FeatureExtractor,
    real: Tensor,
    dense: Evidence | None,
    losses: Tensor | None,
    all_losses: list[Tensor | None],
    latency: list[dict[str, Any]] | None,
) -> tuple[Record, Evidence | None]:
    """One record; what goes wrong in an arm becomes its record, not the end of the comparison."""
    shared = {"arm": one.arm, "budget": one.budget, "seed": seed}
    made = provenance(str(settings.device), extractor.id)
    if one.error is not None:
        return Record(**shared, status="unreachable", message=str(one.error), provenance=made), None  # type: ignore[arg-type]
    started = time.perf_counter()
    try:
        images = generate(
            one.pipe, settings.n, seed=seed, batch_size=settings.batch_size, steps=one.steps,
            guidance_scale=settings.guidance_scale, quiet=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        write_record(folder, Record(**shared, status="cancelled", message="interrupted", provenance=made))  # type: ignore[arg-type]
        raise
    except (DiffratioError, RuntimeError) as error:
        return Record(**shared, status="failed", message=str(error).splitlines()[0], provenance=made), None  # type: ignore[arg-type]
    features = extractor.extract(images)
    name = f"{one.arm.name}-{round(100 * one.budget)}-s{seed}"
    path = f"images/{name}.png"
    with atomic_file(folder / path) as temporary:
        sample_grid(images[:GRID], columns=10).save(temporary, format="PNG")
    evidence = Evidence(
        images,
        features,
        real,
        dense=dense,
        losses=losses,
        reference_losses=all_losses[1] if settings.finetuned else all_losses[0],
    )
    quality = measure([name for name in METRICS if name != "nearest_distance"], evidence)
    cost = {
        "macs": one.cost.total,
        "macs_dense": one.cost.dense,
        "fraction": one.cost.fraction,
        "latency": latency or [],
        "peak_memory_mib": None,
    }
    _say(
        f"{one.arm.name} at {one.cost.fraction:.3f} of the MACs, seed {seed}: "
        f"KID x 1000 {quality['kid_lite0']['value']:.2f}, {time.perf_counter() - started:.0f} s"
    )
    record = Record(
        **shared,  # type: ignore[arg-type]
        n=settings.n,
        run=one.run,
        sampler=read_sampler(one.pipe),
        guidance_scale=settings.guidance_scale,
        schedule=one.schedule,
        cost=cost,
        quality=quality,
        images={"samples": path},
        provenance=made,
    )
    return record, evidence


def read_sampler(pipe: Any) -> str:
    """Class name of a pipeline's scheduler."""
    return type(pipe.scheduler).__name__


def _block(repeats: int, device: str) -> dict[str, Any]:
    from diffratio.evaluation.block import block_table

    return block_table(repeats=repeats, device=device)


def _row(record: Record) -> dict[str, Any]:
    latency = record.cost.get("latency") or []
    return {
        "arm": record.arm.name,
        "budget": record.budget,
        "seed": record.seed,
        "status": record.status,
        "message": record.message,
        "macs_fraction": record.cost.get("fraction"),
        "kid_lite0": (record.quality.get("kid_lite0") or {}).get("value"),
        "excess_loss": (record.quality.get("excess_loss") or {}).get("value"),
        "time_fraction": {
            str(one["batch"]): one["median_ms"] / one["dense_median_ms"] for one in latency if one["dense_median_ms"]
        },
    }
