"""The arms of a comparison: which weights carry which method, and which dense arm each is paired with."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.checkpoint import load_pipeline, read_card, resolve, shipped_beside
from diffratio.checkpoint.parts import scheduler_of
from diffratio.cost.macs import Cost
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.evaluation.compare.settings import CompareSettings, TrainedArm, method_and_file
from diffratio.evaluation.records import Arm, record_id
from diffratio.files import sha256
from diffratio.methods.base import Method, MethodConfig, config_to_json, split_variant
from diffratio.methods.dato import DaTo, DaToMethod
from diffratio.methods.dense import Dense
from diffratio.methods.fewer_steps import FewerSteps
from diffratio.methods.step_front import FRONT_FILE
from diffratio.sampling.generate import generate
from diffratio.sampling.prompted import dense_run
from diffratio.sampling.schedulers import objective_of
from diffratio.sensitivity import CALIBRATED, Sensitivity, find_map, required_map, solved

SCHEDULES = "schedules"  # folder beside the checkpoints: fronts of step schedules, by the checkpoint's name
DENSE, FINETUNED = "dense", "dense_finetuned"
_CALIBRATION, _CALIBRATION_SEED = 2, 2**20


@dataclass
class Contender:
    """One arm, ready to run, or the reason why it is not.

    Args:
        arm: what its records call it.
        budget: fraction of the dense run's MACs that was asked for.
        pipe: an attached pipeline; None where the budget is out of reach.
        run: the sampling run after the method adapted it.
        cost: analytic cost of that run.
        seed: the only seed whose records it stands in (weights trained with it); None stands in all of them.
        partner: the dense arm that it is paired with on the same noise; None for the dense model itself.
        unreachable: why it cannot cost its budget.
        failure: what went wrong while it was prepared, which is then what its records say.
        flags: what the checks on cheating found.
    """

    arm: Arm
    budget: float
    pipe: Any = None
    run: SamplingRun | None = None
    cost: Cost | None = None
    seed: int | None = None
    partner: Contender | None = None
    unreachable: str | None = None
    failure: str | None = None
    flags: tuple[str, ...] = field(default=())

    def id(self, seed: int) -> str:
        """Name of its record for a seed."""
        return record_id(self.arm.name, self.budget, seed)

    @property
    def key(self) -> str:
        """Its name among all arms of all seeds."""
        return self.id(self.seed or 0) + ("" if self.seed is None else "-trained")

    @property
    def paired_with(self) -> str | None:
        """Name of the dense arm that it is paired with."""
        return None if self.partner is None else self.partner.arm.name

    @property
    def steps(self) -> int:
        """Evaluated sampling steps."""
        return 0 if self.run is None else self.run.steps

    @property
    def method(self) -> Method | None:
        """The attached method, of several the token-level one; None for the plain dense model."""
        return self.methods[-1] if self.methods else None

    @property
    def methods(self) -> tuple[Method, ...]:
        """All that is attached, outermost first."""
        transformer = self.pipe.transformer
        return tuple(surgery.attachment(transformer).methods) if surgery.is_applied(transformer) else ()

    @property
    def schedule(self) -> dict[str, Any] | None:
        """The keep schedule of a routed arm."""
        bins = getattr(self.method, "bins", None)
        return {"bins": [list(row) for row in bins]} if bins else None

    @property
    def measured(self) -> bool:
        """Whether its cost depends on the input: it is counted while its samples are made."""
        return self.pipe is not None and surgery.is_measured(self.pipe.transformer)

    def forget_counts(self) -> None:
        """Counts anew from here on."""
        if self.measured:
            surgery.forget_counts(self.pipe.transformer)

    @property
    def has_losses(self) -> bool:
        """Whether single forwards stand for it: not where steps, state between them or guidance are what it changes."""
        return all(
            method.name == DENSE or (method.token_level and not method.stateful and not method.needs_guidance)
            for method in self.methods
        )


@dataclass(frozen=True)
class Lineup:
    """All arms, dense first, and the run that they are asked to do cheaper."""

    contenders: tuple[Contender, ...]
    run: SamplingRun
    objective: str

    @property
    def dense(self) -> Contender:
        """The dense model as it was given."""
        return self.contenders[0]

    def cells(self, seeds: Sequence[int]) -> list[tuple[int, Contender]]:
        """(seed, arm) of every record, dense arms first in each seed."""
        return [(seed, one) for seed in seeds for one in self.contenders if one.seed in (None, seed)]


def line_up(settings: CompareSettings, device: str, trained: Sequence[TrainedArm] = ()) -> Lineup:
    """Loads every arm and solves every budget.

    Training-free methods run on the base weights and, as `NAME@finetuned`, on the fine-tuned dense ones. Each arm is
    paired with the dense arm on its own weights; one that was fine-tuned, with the equally fine-tuned dense model.

    Raises:
        DiffratioError: a checkpoint that is missing, of the wrong kind, or of another objective.
    """
    base = _load(settings.weights, "weights", device, settings.parts)
    shared = base if hasattr(base, "text_encoder") else None  # one text encoder and VAE for all arms
    computing = next(base.transformer.parameters()).dtype  # off the CPU as stored, which may be another for each arm
    run = dense_run(base, settings.steps, settings.guidance_scale)
    objective = _objective(settings.weights) or objective_of(base.scheduler)
    found = [_ready(base, Arm(DENSE, settings.weights, {"name": DENSE}, weights_sha256=_digest(settings.weights)), run)]
    controls: list[Contender] = []
    given = [(settings.finetuned, None)] if settings.finetuned else []
    for source, seed in [*given, *((one.folder, one.seed) for one in trained if one.name == FINETUNED and one.folder)]:
        assert source is not None
        _same_objective(source, objective, settings.weights)
        arm = Arm(FINETUNED, source, {"name": DENSE}, True, _steps_of(source), _digest(source))
        pipe = _load(source, "finetuned", device, shared, computing)
        controls.append(_ready(pipe, arm, run, seed=seed, partner=found[0]))
    found += controls

    def control(seed: int | None) -> Contender:
        return next((one for one in controls if one.seed in (None, seed)), found[0])

    routed = [TrainedArm("", 0.0, -1, source) for source in settings.routed]
    for one in [*routed, *(one for one in trained if one.name != FINETUNED and one.folder)]:
        assert one.folder is not None
        _same_objective(one.folder, objective, settings.weights)
        routed_arm = _routed(one, device, run, found, control, settings.mapped, shared, computing)
        found.append(routed_arm)
        tops = [(budget, method) for budget in settings.budgets for method in settings.on_routed]
        found += [_on_top(routed_arm, method, budget, run) for budget, method in tops if budget < routed_arm.budget]
    sensitivity = _map(settings, base, run) if settings.mapped else None
    for weights in [found[0], *controls]:
        mark = "" if weights is found[0] else "@finetuned"
        for budget in settings.budgets:
            for method in settings.training_free:
                found.append(_training_free(method, mark, weights, budget, run, sensitivity, settings.guidance_scale))
    return Lineup(tuple(found), run, objective)


def with_method(pipe: Any, config: MethodConfig) -> Any:
    """A pipeline of its own with the method applied and attached; the weights are shared, not copied."""
    own = copy.deepcopy(pipe, _shared(pipe))
    tied = surgery.is_applied(own.transformer)
    surgery.apply_(own.transformer, config)
    if not tied and not isinstance(config, Dense | FewerSteps):
        surgery.attach_(own)
    return own


def _shared(pipe: Any) -> dict[int, Any]:
    """What copies of a pipeline share: the transformer's weights, and all models that no method changes."""
    weights = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
    others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not pipe.transformer]
    return {id(one): one for one in (*weights, *others)}


def _ready(
    pipe: Any,
    arm: Arm,
    run: SamplingRun,
    budget: float = 1.0,
    seed: int | None = None,
    partner: Contender | None = None,
) -> Contender:
    contender = Contender(arm, budget, pipe, seed=seed, partner=partner)
    applied = surgery.is_applied(pipe.transformer)
    contender.run = surgery.attachment(pipe.transformer).adapt(run) if applied else run
    contender.cost = surgery.macs(pipe.transformer, run=run)
    return contender


def _routed(
    one: TrainedArm,
    device: str,
    run: SamplingRun,
    found: Sequence[Contender],
    control: Any,
    untrained: Sequence[str],
    parts: Any,
    computing: torch.dtype,
) -> Contender:
    source = one.folder
    assert source is not None
    pipe = load_pipeline(source, computing, device, parts)
    if not surgery.is_applied(pipe.transformer):
        raise DiffratioError(f"routed: {source!r} is a dense checkpoint; routed takes what `diffratio export` wrote")
    config = surgery.attachment(pipe.transformer).token_method.config
    seed = None if one.seed < 0 else one.seed
    schedule = getattr(config, "schedule", None)
    budget = one.budget or (schedule.budget if schedule else 1.0)
    if not one.budget and schedule and schedule.unit != "macs":  # a comparison's budgets are MACs
        budget = min(1.0, math.ceil(100 * surgery.macs(pipe.transformer, run=run).fraction) / 100)
    taken = {c.arm.name for c in found if c.budget == budget and (seed is None or c.seed in (None, seed))}
    name = one.name or config.method.name
    name = _unique(f"{name}_finetuned" if name in untrained else name, taken)  # its untrained arm has the plain name
    steps = _steps_of(source)
    arm = Arm(name, source, config_to_json(config), config.as_published, steps, _digest(source))
    return _ready(pipe, arm, run, budget, seed, found[0] if steps is None else control(seed))


def _on_top(below: Contender, method: str, budget: float, run: SamplingRun) -> Contender:
    """A routed arm with a step-level method on top, together at a budget."""
    own, (method, file, label) = below.arm, _found(method)
    arm = replace(own, name=f"{own.name}-{below.budget:g}+{label}")
    try:
        config = surgery.for_budget_on_top(method, below.pipe.transformer, budget, run, file)
    except BudgetUnreachable as error:
        return Contender(arm, budget, seed=below.seed, partner=below.partner, unreachable=str(error))
    arm = replace(arm, method={**own.method, "on_top": config_to_json(config)})
    return _ready(with_method(below.pipe, config), arm, run, budget, below.seed, below.partner)


def _map(settings: CompareSettings, base: Any, run: SamplingRun) -> Sensitivity:
    """The map of the base weights; a fine-tuned control takes the schedules that it solves for them."""
    name = settings.map or settings.weights
    if not Path(find_map(name)).is_file():
        raise DiffratioError(
            f"methods: {settings.mapped[0]!r} is solved on a sensitivity map, and {name!r} is no map's file and no "
            "checkpoint that ships with one; `diffratio measure EXPERIMENT --out FILE`, then map=FILE, or train=true"
        )
    return required_map(name, base.transformer, run)


def _training_free(
    method: str,
    mark: str,
    weights: Contender,
    budget: float,
    run: SamplingRun,
    sensitivity: Sensitivity | None,
    guidance_scale: float,
) -> Contender:
    work = None
    method, file, label = _found(method)
    name, source, tuned = f"{label}{mark}", weights.arm.weights, weights.arm.finetuned_steps
    digest = weights.arm.weights_sha256
    transformer = weights.pipe.transformer
    config: MethodConfig
    try:
        if method in CALIBRATED:
            assert sensitivity is not None
            config = solved(method, sensitivity, transformer, budget)
        elif file is not None:  # a fine-tuned control takes the schedules that were found on its base
            options: dict[str, Any] = {"budget": budget, "run": run, "same_weights": not mark}
            if method == DaToMethod.name:
                config = DaTo(schedule=surgery.find_step_schedule(file, transformer, **options))
            else:
                config = surgery.cached_by(file, transformer, **options)
        else:
            work = _sampling_with(weights.pipe, run.steps, guidance_scale)
            config = surgery.for_budget(method, transformer, budget, run=run, work=work)
    except BudgetUnreachable as error:
        arm = Arm(name, source, {"name": split_variant(method)[0]}, True, tuned, digest)
        return Contender(arm, budget, seed=weights.seed, partner=weights, unreachable=str(error))
    arm = Arm(name, source, config_to_json(config), config.as_published, tuned, digest)
    pipe = with_method(weights.pipe, config)
    if work is not None and surgery.is_measured(pipe.transformer):
        calibration_samples(pipe, run.steps, guidance_scale)
    return _ready(pipe, arm, run, budget, weights.seed, weights)


def calibration_samples(pipe: Any, steps: int, guidance_scale: float) -> None:
    """Samples by which a method whose cost depends on the input is priced; their seed is none of a comparison's."""
    generate(
        pipe, _CALIBRATION, seed=_CALIBRATION_SEED, batch_size=_CALIBRATION, steps=steps, guidance_scale=guidance_scale,
        quiet=True, distributed=False,
    )  # fmt: skip


def _sampling_with(pipe: Any, steps: int, guidance_scale: float) -> Callable[[nn.Module], None] | None:
    """Whole sampling runs of a pipeline with another transformer in it; None where prompts are not known yet."""
    if backbone_of(pipe.transformer).condition == "text":
        return None

    def work(transformer: nn.Module) -> None:
        own = copy.deepcopy(pipe, {**_shared(pipe), id(pipe.transformer): transformer})
        surgery.attach_(own)
        calibration_samples(own, steps, guidance_scale)
        surgery.detach_(own)

    return work


def _found(method: str) -> tuple[str, str | None, str]:
    """A method, its file and what its arm is called; a name stands for the front that ships for that checkpoint."""
    name, file = method_and_file(method)
    if file is None:
        return name, None, name
    file = shipped_beside(file, SCHEDULES, ".json")
    path = Path(file)  # a search's front goes by its folder
    return name, file, f"{name}@{path.parent.resolve().name if path.name == FRONT_FILE else path.stem}"


def compiled_copy(one: Contender) -> Any:
    """A pipeline of the same arm whose blocks are compiled; the weights are shared."""
    pipe = with_method(one.pipe, Dense()) if one.method is None else copy.deepcopy(one.pipe, _shared(one.pipe))
    surgery.compile_(pipe.transformer)
    return pipe


def _load(source: str, key: str, device: str, parts: Any = None, computing: torch.dtype | None = None) -> Any:
    pipe = load_pipeline(source, computing, device, parts)
    if surgery.is_applied(pipe.transformer):
        raise DiffratioError(
            f"{key}={source!r} is a routed checkpoint; it takes a dense one, and this goes into routed=[...]"
        )
    return pipe


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique


def _digest(source: str) -> str | None:
    """Digest of a local checkpoint's weights: the file's own where there is one file."""
    path = resolve(source)
    if isinstance(path, str):
        return None
    own = Path(path) / "transformer"  # of a pipeline with a text encoder of many GB
    files = sorted((own if own.is_dir() else Path(path)).rglob("*.safetensors"))
    digests = [sha256(file) for file in files]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _steps_of(source: str) -> int | None:
    path = resolve(source)
    steps = read_card(path).training.get("steps") if _has_card(path) else None
    return steps if isinstance(steps, int) else None


def _has_card(path: Path | str) -> TypeGuard[Path]:
    """Whether a place is a folder of ours; a pipeline of diffusers has no card."""
    return isinstance(path, Path) and (path / "card.json").is_file()


def _objective(source: str) -> str | None:
    """What a checkpoint predicts, by its card or by its scheduler; None of one that is not on this machine."""
    path = resolve(source)
    if _has_card(path):
        return read_card(path).objective
    return objective_of(scheduler_of(path)) if isinstance(path, Path) and (path / "scheduler").is_dir() else None


def _same_objective(source: str, objective: str, weights: str) -> None:
    if (own := _objective(source)) not in (objective, None):
        raise DiffratioError(
            f"{source!r} predicts {own} and weights={weights!r} predict {objective}; "
            "compare checkpoints of one objective"
        )
