"""The method contract and its registry: a frozen config and a class that decides the plans."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from diffratio.catalog import METHODS as _METHODS
from diffratio.cost.macs import BlockUse, Cost, CostTable, Description, run_cost
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import BudgetUnreachable, DiffratioError, unknown
from diffratio.methods.actions import Reuse, Skip, StepAction
from diffratio.methods.step_schedule import StepSchedule, load_step_schedule
from diffratio.methods.streams import Joint, Result, image_of, with_image
from diffratio.routing.schedule import SLACK, KeepSchedule
from diffratio.tokens.plan import Plan
from diffratio.tokens.positions import of_samples, take_positions

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


@dataclass
class BlockCall:
    """One block, ready to be run on some of its tokens or samples.

    Args:
        inner: the block's own forward.
        arguments: its arguments by name.
        hidden: name of the image-token argument.
        per_token: names of arguments with one entry an image token.
        per_sample: names of arguments with one entry a sample.
        attention: name of the argument, a dictionary, whose entries reach the family's own attention processor; None
            where the processors are not ours.
        streams: names of the arguments that the block returns, in its order: `hidden` alone, or beside the text.
        positions: name of the argument with the positions of all text and after them all image tokens.
    """

    inner: Callable[..., Any]
    arguments: dict[str, Any]
    hidden: str
    per_token: tuple[str, ...]
    per_sample: tuple[str, ...]
    attention: str | None = None
    streams: tuple[str, ...] = ("hidden_states",)
    positions: str | None = None

    @property
    def x(self) -> Tensor:
        """Image tokens at full length (B, N, C)."""
        x = self.arguments[self.hidden]
        assert isinstance(x, Tensor)
        return x

    @property
    def text_name(self) -> str | None:
        """Name of the argument that is a stream of text beside the image tokens; None where the family has none."""
        return next((name for name in self.streams if name != self.hidden), None)

    @property
    def entering(self) -> Result:
        """What a bypassed block gives: all streams as they came."""
        return self.x if self.text_name is None else Joint(self.x, self.arguments[self.text_name])

    def on(self, plan: Plan) -> Result:
        """Runs the block on the plan's tokens and restores the image tokens to full length (B, N, C)."""
        result = self(plan)
        return with_image(result, plan.restore(image_of(result), self.x))

    def nested(self, nested: Tensor) -> tuple[Result, Result]:
        """Runs the block on two nested sets of tokens in one call, with all of the text in each.

        Args:
            nested: the image tokens are K and after them L of the same again; places of these among the K, (B, L).

        Returns:
            Results of the K tokens, and of the L.
        """
        sizes, call, name = [self.x.shape[1] - nested.shape[1], nested.shape[1]], self, self.text_name
        if name is not None:
            text = self.arguments[name]
            call = dataclasses.replace(self, arguments={**self.arguments, name: torch.cat([text, text], dim=1)})
        result = call(nested=nested)
        upper, lower = image_of(result).split(sizes, dim=1)
        if not isinstance(result, Joint):
            return upper, lower
        texts = (None, None) if result.text is None else result.text.chunk(2, dim=1)
        return Joint(upper, texts[0]), Joint(lower, texts[1])

    def _returned(self, output: Any) -> Result:
        """What the block's own forward returns, by stream."""
        if self.text_name is None:
            assert isinstance(output, Tensor)
            return output
        by_name = dict(zip(self.streams, output, strict=True))
        return Joint(by_name[self.hidden], by_name[self.text_name])

    def __call__(self, plan: Plan | None = None, **attention: Tensor) -> Result:
        """Runs the block on the plan's tokens -> (B, K, C) and all of the text; without a plan on all tokens.

        Args:
            plan: which tokens.
            **attention: for the family's own attention processor: `key_bias` (B, K), added to the logits of each key;
                or `nested` (B, L), where the last L tokens are some of the others again and both sets keep apart.

        Raises:
            DiffratioError: such an entry, and the attention processors are not ours.
        """
        arguments = self.arguments if plan is None else self.reduced(plan.reduce(self.x), plan).arguments
        if not attention:
            return self._returned(self.inner(**arguments))
        if self.attention is None:
            raise DiffratioError(f"this transformer's attention processors are not ours: no {', '.join(attention)}")
        given: dict[str, Any] = {**(arguments.get(self.attention) or {}), **attention}
        if self.positions is not None and self.text_name is not None:
            given["text_tokens"] = arguments[self.text_name].shape[1]
        return self._returned(self.inner(**{**arguments, self.attention: given}))

    def reduced(self, x: Tensor, plan: Plan) -> BlockCall:
        """The same block on a plan's tokens, of which x (B, K, C) is the content."""
        arguments = {**self.arguments, self.hidden: x}
        for name in self.per_token:
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = plan.take(arguments[name])
        if self.positions is not None and arguments.get(self.positions) is not None:
            arguments[self.positions] = take_positions(arguments[self.positions], plan, self.x.shape[1])
        return dataclasses.replace(self, arguments=arguments)

    def select(self, samples: Tensor, hidden: bool = True) -> BlockCall:
        """The same block for some of the samples, given by index (b,).

        Args:
            samples: their indices.
            hidden: whether the image tokens are selected too; not, where `reduced` replaces them next.
        """
        arguments, batch = dict(self.arguments), self.x.shape[0]
        for name in (*((self.hidden,) if hidden else ()), *self.per_token, *self.per_sample):
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
                arguments[name] = value.index_select(0, samples)
        if self.positions is not None and arguments.get(self.positions) is not None:
            arguments[self.positions] = of_samples(arguments[self.positions], samples)
        return dataclasses.replace(self, arguments=arguments)


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

    def __init__(self, config: Any, description: Description) -> None:
        self.config = config
        self.description = description

    @property
    def decides_steps(self) -> bool:
        """Whether it may do something else with a step than compute it."""
        return type(self).action is not Method.action

    def check_beside(self, others: Sequence[Method]) -> None:
        """Raises DiffratioError for a method on the same transformer that this one does not go with."""

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

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> Any:
        """The config that costs within [budget - 0.01, budget] of the dense run.

        Raises:
            BudgetUnreachable: no setting of the knob does.
        """
        return dearest_within(cls, [cls.config_class()], description, run, check_budget(budget))


def solve_for_budget(
    cls: type[Method], description: Description, run: SamplingRun, budget: float, costs: CostTable | None = None
) -> MethodConfig:
    """The config of a method for a budget in any unit.

    Args:
        cls: the method.
        description: the transformer.
        run: the run that the budget counts.
        budget: fraction of the dense run; lower keeps fewer tokens.
        costs: cost table of that run, for a budget in its unit; None counts MACs.

    Raises:
        BudgetUnreachable: no setting of the method costs that.
        DiffratioError: a method that has no keep schedule cannot be solved on a table by bins.
    """
    if costs is None:
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
    return dataclasses.replace(use, planning=use.planning + sum(one.planning for one in outer)) if outer else use


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

    Raises:
        DiffratioError: there is none; the nearest names are given.
    """
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    importlib.import_module(_METHODS[name][0])
    return _REGISTERED[name]


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

    Raises:
        DiffratioError: unknown method or key (the nearest names are given), or a value the config refuses.
    """
    values = dict(document)
    cls = get_method(values.pop("name", "")).config_class
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"key of method {document['name']!r}", key, fields)
        if "KeepSchedule" in fields[key] and isinstance(value, Mapping):
            values[key] = KeepSchedule.from_json(value)
        elif "StepSchedule" in fields[key] and value is not None:
            values[key] = StepSchedule.from_json(value) if isinstance(value, Mapping) else load_step_schedule(value)
        elif isinstance(value, list):
            values[key] = tuple(value)
    try:
        return cls(**values)
    except TypeError as error:
        raise DiffratioError(f"method {document['name']!r}: {error}") from None
