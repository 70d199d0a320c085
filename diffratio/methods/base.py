"""The method contract and its registry: a frozen config and a class that decides the plans."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from diffratio.catalog import METHODS as _METHODS
from diffratio.cost.macs import BlockUse, Cost, CostTable, Description, run_cost
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import BudgetUnreachable, DiffratioError, shortened, unknown
from diffratio.methods.actions import Reuse, Skip, StepAction
from diffratio.methods.calls import BlockCall as BlockCall
from diffratio.methods.step_schedule import StepSchedule, load_step_schedule
from diffratio.methods.streams import Result
from diffratio.routing.schedule import SLACK, KeepSchedule
from diffratio.tokens.plan import Plan

_REGISTERED: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True)
class MethodConfig:
    """Base of every method's config. Subclasses validate their fields on construction."""

    @property
    def method(self) -> type[Method]:
        """The class that carries this config out."""
        for name in _METHODS:
            if get_method(name).config_class is type(self):
                return get_method(name)
        raise unknown("method config", type(self).__name__, _METHODS)

    @property
    def as_published(self) -> bool:
        """False where sites or blocks were widened beyond the paper to meet a budget."""
        return True


@dataclass(frozen=True)
class Measured:
    """What a run with a method cost.

    Args:
        fraction: of the dense run's MACs.
        method: as it stood in the transformer, with what it noted.
    """

    fraction: float
    method: Method


class Method:
    """Decides the plans. One object serves training, sampling, costing and comparing.

    Attributes:
        name: registered name, also the YAML's.
        config_class: its config dataclass.
        stateful: needs an open run (state from step to step).
        token_level: reduces tokens; two such methods cannot share a transformer.
        learned: adds parameters.
        needs_guidance: works on the guidance halves; a run without guidance is an error.
        indexes_attention: it needs the family's own attention processors: its attention plans choose queries and keys
            separately (`AttentionPlan`), or it calls blocks with a key bias.
        nests_attention: it is faster with them (nested sets of tokens), and gives the same without.
        takes_costs: its `for_budget` also takes `costs=`, a cost table in another unit than MACs.
        static: its cost follows from config and run. Where not, it depends on the input: it is counted on real runs, of
            which `traces` tells, and budgets are met by `calibrate`.
        variants: what may stand behind its name, `name:variant`, to say which config a budget is solved for.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]]
    stateful: ClassVar[bool] = False
    token_level: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    needs_guidance: ClassVar[bool] = False
    indexes_attention: bool = False
    nests_attention: bool = False
    takes_costs: ClassVar[bool] = False
    static: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, description: Description) -> None:
        self.config = config
        self.description = description

    @property
    def decides_steps(self) -> bool:
        """Whether it may do something else with a step than compute it."""
        return type(self).action is not Method.action

    def check_beside(self, others: Sequence[Method]) -> None:
        """Raises DiffratioError for a method on the same transformer that this one does not go with."""

    def attach(
        self, transformer: Any, blocks: Sequence[nn.Module], modules_of: Callable[[nn.Module, str], list[nn.Module]]
    ) -> None:
        """Puts in what is not ours, after all classes are swapped; again into every copy of the transformer.

        Args:
            transformer: converted.
            blocks: its blocks in order.
            modules_of: (block, site) -> the modules of a site in it.
        """

    def detach(self) -> None:
        """Takes out what `attach` put in, before anything else is undone."""

    def ran(self, layer: int, site: str, ctx: StepContext) -> None:
        """Called when a block (site `block`), or a site that the method named, is really computed."""

    def block_modules(self) -> list[nn.Module] | None:
        """One module a block, to be registered there as `router`."""
        return None

    def root_modules(self) -> dict[str, nn.Module]:
        """Modules to be registered on the transformer itself."""
        return {}

    def sites(self) -> tuple[str, ...]:
        """Sites inside a block for which `plan` wants to be asked."""
        return ()

    def adapt(self, run: SamplingRun) -> SamplingRun:
        """The run that is really evaluated; fewer steps, for instance. The default chooses the guided steps."""
        return run.with_guided(self.guided(run))

    def guided(self, run: SamplingRun) -> tuple[bool, ...] | None:
        """By step, whether the unconditional half is evaluated; None is every step, as the run's guidance says."""
        return run.guided

    def action(self, step: int, run: SamplingRun) -> StepAction | None:
        """What is done with a whole step instead of computing it in full; None computes it. Costs ask for this."""
        return None

    def skips(self, run: SamplingRun) -> tuple[Skip, ...]:
        """Block ranges whose residual is kept at full steps; the default is those of `action`."""
        actions = (self.action(step, run) for step in range(run.steps))
        return tuple(dict.fromkeys(one for one in actions if isinstance(one, Skip)))

    def begin_run(self, run: SamplingRun) -> None:
        """A sampling run begins: whatever is kept from step to step is forgotten here."""

    def end_run(self) -> None:
        """The run is over or given up: large things that were kept from step to step are freed here."""

    def stored_numbers(self, run: SamplingRun) -> int:
        """Numbers that are kept from step to step for one sample, all evaluated guidance halves, at the most."""
        return 0

    def begin_step(self, ctx: StepContext) -> StepAction | None:
        """Called before the first block of every forward, unless a method further out reuses the last output.

        Returns:
            What is done with the step instead of computing it in full. The default does as `action` says in an open
            run; a method that decides otherwise says in `skips` which ranges it may skip, and in `macs` what it costs.
        """
        return None if ctx.run is None or ctx.step is None else self.action(ctx.step, ctx.run)

    def see(self, sample: Tensor, ctx: StepContext) -> None:
        """Shows the transformer's input (B, C, H, W) before the first block of a forward that is computed."""

    def plan(self, layer: int, site: str, x: Tensor, ctx: StepContext) -> Plan | None:
        """The plan for one place, or None to compute everything. Asked at `block` first.

        Args:
            layer: index of the block.
            site: `block`, or one of `sites()`.
            x: what enters there (B, N, C): the block's input, or the site module's own.
            ctx: where this forward stands.
        """
        return None

    def run_block(self, layer: int, call: BlockCall, ctx: StepContext) -> Result:
        """Runs one block; the default is plan, reduce, block, restore. A bypass returns `call.entering`."""
        plan = self.plan(layer, "block", call.x, ctx)
        return call() if plan is None else call.on(plan)

    def end_step(self, output: Tensor, ctx: StepContext) -> None:
        """Called with the prediction of every forward that was computed (not with a reused one)."""

    def use(self, layer: int, step: int, run: SamplingRun) -> BlockUse:
        """How a block is used in a step, for the accounting."""
        return BlockUse()

    def macs(self, run: SamplingRun, linear_only: bool = False) -> Cost:
        """Cost on a run, planning included, against the dense cost of the same run.

        Raises:
            DiffratioError: the method works on the guidance halves and the run has none.
        """
        return combined_cost([self], self.adapt(run), run, linear_only)

    @contextlib.contextmanager
    def replaying(self, trace: Any) -> Iterator[None]:
        """Costs asked for in here are those of one of the `traces`."""
        yield

    def traces(self, steps: int) -> Mapping[Any, int]:
        """Of a method that is not `static`: what it did in real runs of so many steps -> samples that did so."""
        return {}

    def forget_traces(self) -> None:
        """Starts counting anew."""

    def statistics(self, run: SamplingRun) -> dict[str, float]:
        """What `traces` say of a run, in figures; empty where nothing was counted."""
        return {}

    @classmethod
    def of_variant(cls, variant: str | None) -> MethodConfig:
        """The config that `name:variant` stands for; None is the method's own default."""
        return cls.config_class()

    @classmethod
    def calibrate(
        cls, start: MethodConfig, measure: Callable[[MethodConfig], Measured], description: Description, budget: float
    ) -> MethodConfig:
        """Of a method that is not `static`: the config that costs within [budget - 0.01, budget] when it is run.

        Args:
            start: what is not searched.
            measure: config -> what a run with it costs.
            description: the transformer.
            budget: fraction of the dense run.

        Raises:
            BudgetUnreachable: no setting does.
        """
        raise NotImplementedError

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> Any:
        """The config that costs within [budget - 0.01, budget] of the dense run.

        Raises:
            BudgetUnreachable: no setting of the knob does.
            DiffratioError: its cost must be measured, and a description cannot be run.
        """
        if not cls.static:
            raise DiffratioError(
                f"{cls.name}: its cost depends on the input and is measured: "
                "diffratio.for_budget(name, transformer, budget) runs it"
            )
        return dearest_within(cls, [cls.config_class()], description, run, check_budget(budget))

    @classmethod
    def variant_for_budget(cls, variant: str, description: Description, run: SamplingRun, budget: float) -> Any:
        """`for_budget` of one of the `variants`."""
        raise NotImplementedError


def solve_for_budget(
    cls: type[Method],
    description: Description,
    run: SamplingRun,
    budget: float,
    costs: CostTable | None = None,
    variant: str | None = None,
) -> MethodConfig:
    """The config of a method for a budget in any unit.

    Args:
        cls: the method.
        description: the transformer.
        run: the run that the budget counts.
        budget: fraction of the dense run; lower keeps fewer tokens.
        costs: cost table of that run, for a budget in its unit; None counts MACs.
        variant: one of the method's `variants`; None is the method itself.

    Raises:
        BudgetUnreachable: no setting of the method costs that.
        DiffratioError: a method that has no keep schedule cannot be solved on a table by bins.
    """
    if costs is None and variant is not None:
        config = cls.variant_for_budget(variant, description, run, budget)
    elif costs is None:
        config = cls.for_budget(description, run, budget)
    elif cls.takes_costs:
        config = cast(Any, cls).for_budget(description, run, budget, costs=costs)
    else:
        taking = ", ".join(name for name in _METHODS if get_method(name).takes_costs)
        raise DiffratioError(f"{cls.name}: its budget counts MACs; a budget in {costs.unit} is for {taking}")
    assert isinstance(config, MethodConfig)
    return config


def check_guidance(method: type[Method], run: SamplingRun) -> None:
    """Raises DiffratioError for a method that works on the guidance halves, on a run without guidance."""
    if method.needs_guidance and run.guidance == "none":
        raise DiffratioError(
            f"{method.name} needs classifier-free guidance and this run has guidance 'none': "
            "take a run with guidance 'cfg' (guidance_scale above 1)"
        )


def action_of(methods: Sequence[Method], step: int, run: SamplingRun) -> StepAction | None:
    """What methods make of a step together: the outermost one that wants something decides."""
    return next((action for method in methods if (action := method.action(step, run)) is not None), None)


def combined_use(
    methods: Sequence[Method], layer: int, step: int, run: SamplingRun, action: StepAction | None
) -> BlockUse:
    """How a block is used in a step: as the last (token-level) method says, unless a step-level one skips it."""
    outer = [method.use(layer, step, run) for method in methods[:-1]]
    if (isinstance(action, Skip) and action.covers(layer)) or any(use.bypassed for use in outer):
        return BlockUse(bypassed=True)
    use = methods[-1].use(layer, step, run)
    if not outer:
        return use
    planning = use.planning + sum(one.planning for one in outer)
    skipped = tuple(dict.fromkeys(site for one in (use, *outer) for site in one.skipped))
    return dataclasses.replace(use, planning=planning, skipped=skipped)


def combined_cost(
    methods: Sequence[Method], run: SamplingRun, reference: SamplingRun, linear_only: bool = False
) -> Cost:
    """Cost of methods that share a transformer.

    Args:
        methods: outermost first; the last one decides the plans.
        run: the run that is evaluated, adapted by all of them.
        reference: the run whose dense cost is the denominator.
        linear_only: count Linear layers only.

    Raises:
        DiffratioError: one of them works on the guidance halves and the run has none.
    """
    for method in methods:
        check_guidance(type(method), run)
    actions = [action_of(methods, step, run) for step in range(run.steps)]
    return run_cost(
        methods[-1].description,
        run,
        lambda layer, step: combined_use(methods, layer, step, run, actions[step]),
        reference,
        linear_only,
        lambda step: not isinstance(actions[step], Reuse),
    )


def dearest_within(
    cls: type[Method],
    candidates: list[Any],
    description: Description,
    run: SamplingRun,
    budget: float,
    hint: str = "",
) -> Any:
    """The dearest of several configs that costs within [budget - 0.01, budget].

    Raises:
        BudgetUnreachable: none does; carries the reachable range.
    """
    priced = [(cls(config, description).macs(run).fraction, config) for config in candidates]
    fitting = [pair for pair in priced if budget - SLACK <= pair[0] <= budget + 1e-12]
    if not fitting:
        fractions = [fraction for fraction, _ in priced]
        raise BudgetUnreachable(cls.name, budget, (min(fractions), max(fractions)), hint)
    return max(fitting, key=lambda pair: pair[0])[1]


def register(cls: M) -> M:
    """Class decorator: makes a method known under its name."""
    _REGISTERED[cls.name] = cls
    return cls


def methods() -> dict[str, str]:
    """Registered names with one line each; imports nothing heavy."""
    return {name: line for name, (_, line) in _METHODS.items()}


def get_method(name: str) -> type[Method]:
    """The method of that name.

    `name:variant` is the same method; see `Method.variants`.

    Raises:
        DiffratioError: there is none, or no such variant; the nearest names are given.
    """
    base, variant = split_variant(name)
    if base not in _METHODS:
        raise unknown("method", name, _METHODS)
    importlib.import_module(_METHODS[base][0])
    cls = _REGISTERED[base]
    if variant is not None and variant not in cls.variants:
        if not cls.variants:
            raise DiffratioError(f"method {base!r} has no variants ({variant!r} was given); leave :{variant} out")
        raise unknown(f"variant of method {base!r}", variant, cls.variants)
    return cls


def split_variant(name: str) -> tuple[str, str | None]:
    """`name:variant` -> both; a plain name has None."""
    base, colon, variant = str(name).partition(":")
    return base, variant if colon else None


def check_budget(budget: float) -> float:
    """Raises DiffratioError for a budget outside (0, 1]."""
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise DiffratioError(f"budget {budget!r} is outside (0, 1]; it is the fraction of the dense run's MACs")
    return float(budget)


def config_to_json(config: MethodConfig) -> dict[str, Any]:
    """Plain data of a config, with the method's name."""
    document: dict[str, Any] = {"name": config.method.name}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        document[field.name] = value.to_json() if isinstance(value, KeepSchedule | StepSchedule) else value
    return document


def config_from_json(document: Mapping[str, Any]) -> MethodConfig:
    """Inverse of `config_to_json`; also reads the YAML of the `method` group, where a step schedule is a file's name.

    Where that file is a search's front, `budget` beside it says which of its schedules.

    Raises:
        DiffratioError: unknown method or key (the nearest names are given), or a value the config refuses.
    """
    values = dict(document)
    cls = get_method(values.pop("name", "")).config_class
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    front = "StepSchedule" in fields.get("schedule", "") and isinstance(values.get("schedule"), str)
    budget = values.pop("budget", None) if front else None
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"key of method {document['name']!r}", key, fields)
        if "KeepSchedule" in fields[key] and isinstance(value, Mapping):
            values[key] = KeepSchedule.from_json(value)
        elif "KeepSchedule" in fields[key] and not isinstance(value, KeepSchedule | None):
            raise DiffratioError(f"method {document['name']!r}: {key} is {shortened(value)}, not a keep schedule")
        elif "StepSchedule" in fields[key] and value is not None:
            read = isinstance(value, Mapping)
            values[key] = StepSchedule.from_json(value) if read else load_step_schedule(value, budget)
        elif fields[key] == "bool" and not isinstance(value, bool):
            raise DiffratioError(f"method {document['name']!r}: {key} is {shortened(value)}; it takes true or false")
        elif isinstance(value, list):
            values[key] = tuple(value)
    try:
        return cls(**values)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        if isinstance(error, DiffratioError):
            raise
        raise DiffratioError(f"method {document['name']!r}: {error}") from None
