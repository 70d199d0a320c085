"""Puts methods into a transformer or a pipeline, in place, and takes them out again.

Classes are swapped in place for subclasses: state-dict keys stay, a deepcopied model runs its own weights, it pickles,
and no upstream forward is copied.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.backbones import Backbone, backbone_of
from diffratio.cost.macs import Cost, Description
from diffratio.cost.run import SamplingRun, StepContext
from diffratio.errors import DiffratioError
from diffratio.methods.base import BlockCall, Method, MethodConfig, check_budget, get_method
from diffratio.tokens.grid import TokenGrid

_STATE = "_diffratio"


class Attachment:
    """What a converted transformer, its blocks and its sites share.

    Args:
        backbone: the family.
        methods: attached methods, outermost first.
        prepared: what the backbone switched off.
        seed: seed of the methods' draws.
    """

    def __init__(self, backbone: Backbone, methods: list[Method], prepared: dict[str, Any], seed: int) -> None:
        self.backbone, self.methods, self.prepared, self.seed = backbone, methods, prepared, seed
        self.run: SamplingRun | None = None
        self.step = 0
        self.context: StepContext | None = None
        self.compile_options: dict[str, Any] | None = None
        self.added: tuple[str, ...] = ()  # names of the modules that methods registered on the transformer

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_attachment, (self.backbone.name,), {k: v for k, v in vars(self).items() if k != "backbone"}

    @property
    def token_method(self) -> Method:
        """The method that decides the plans (the last one attached)."""
        return self.methods[-1]

    def open_run(self, run: SamplingRun) -> None:
        """A sampling run begins: step 0."""
        self.run, self.step = run, 0

    def close_run(self) -> None:
        """Forwards stand on their own again."""
        self.run, self.step, self.context = None, 0, None

    def begin(self, transformer: nn.Module, arguments: dict[str, Any]) -> StepContext:
        """Opens one forward."""
        grid = self.backbone.grid(transformer, arguments["hidden_states"])
        if self.run is not None and not transformer.training:
            if self.step >= self.run.steps:
                raise DiffratioError(
                    f"the open run has {self.run.steps} steps and a further forward was made; "
                    "call scheduler.set_timesteps for a new run, or diffratio.detach_ the pipeline"
                )
            if grid != self.run.grid:
                raise DiffratioError(
                    f"the open run is for a {self.run.grid.height}x{self.run.grid.width} token grid "
                    f"and this sample has {grid.height}x{grid.width}"
                )
            level, levels = self.run.noise_levels[self.step], None
        else:
            if any(method.stateful for method in self.methods):
                raise DiffratioError(
                    f"{self.token_method.name} keeps state from step to step and needs an open run: "
                    "diffratio.attach_(pipe) first, then sample with the pipeline"
                )
            timestep = arguments["timestep"]
            level, batch = None, arguments["hidden_states"].shape[0]
            levels = self.backbone.noise_level(torch.as_tensor(timestep)).detach().reshape(-1).expand(batch)
        self.context = StepContext(
            step=self.step if self.run is not None else None,
            noise_level=level,
            noise_levels=levels,
            run=self.run,
            grid=grid,
            training=transformer.training,
            seed=self.seed,
        )
        for method in self.methods:
            method.begin_step(self.context)
        return self.context


def _rebuild_attachment(backbone: str) -> Attachment:
    from diffratio.backbones import get_backbone

    attachment = Attachment.__new__(Attachment)
    attachment.backbone = get_backbone(backbone)
    return attachment


class _Converted:
    """Mixin of every swapped class."""

    _diffratio: Attachment

    def __reduce__(self) -> tuple[Any, ...]:
        own: Any = type(self)
        kind, base = _converted(own).__bases__
        return _rebuild, (kind, base), self.__dict__


class _Transformer(_Converted):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = super().forward  # type: ignore[misc]
        state = self._diffratio
        arguments = _bound(_base(type(self)), args, kwargs)
        context = state.begin(self, arguments)  # type: ignore[arg-type]
        output = inner(**arguments)
        prediction = output[0]
        for method in state.methods:
            method.end_step(prediction, context)
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if any(method.learned for method in self._diffratio.methods):
            raise DiffratioError(
                "a routed transformer saved by diffusers would load again as a silently dense model; "
                "use diffratio.export(transformer, folder), or diffratio.remove_ it first"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class _Block(_Converted):
    _diffratio_layer: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._diffratio
        context = state.context
        base = _base(type(self))
        if context is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        backbone = state.backbone
        inner = super().forward if state.compile_options is None else _compiled(base, self, state)  # type: ignore[misc]
        call = BlockCall(inner, _bound(base, args, kwargs), backbone.hidden, backbone.per_token, backbone.per_sample)
        return state.token_method.run_block(self._diffratio_layer, call, context)


class _Site(_Converted):
    _diffratio_layer: int
    _diffratio_site: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        inner, context = super().forward, self._diffratio.context  # type: ignore[misc]
        plan = None
        if context is not None:
            plan = self._diffratio.token_method.plan(self._diffratio_layer, self._diffratio_site, x, context)
        if plan is None:
            return inner(x, *args, **kwargs)
        return plan.restore(inner(plan.reduce(x), *args, **kwargs), x)


@functools.cache
def _subclass(kind: type, base: type) -> type:
    """The subclass of `base` with a mixin in front; it keeps the base's name, which diffusers writes into configs."""
    return type(base.__name__, (kind, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


@functools.cache
def _converted(cls: Any) -> type:
    """The swapped class itself, also where FSDP has put a class of its own in front of it."""
    return next(one for one in cls.__mro__ if one.__bases__[0] in _KINDS)


def _base(cls: type) -> Any:
    """The class that was swapped."""
    return _converted(cls).__bases__[1]


def _rebuild(kind: type, base: type) -> Any:
    cls: Any = _subclass(kind, base)
    return cls.__new__(cls)


@functools.cache
def _parameters(base: type) -> tuple[str, ...]:
    return tuple(inspect.signature(base.forward).parameters)[1:]  # type: ignore[attr-defined]


def _bound(base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by name."""
    return dict(zip(_parameters(base), args, strict=False)) | kwargs


_COMPILED: dict[tuple[type, str], Any] = {}


def _compiled(base: Any, block: Any, state: Attachment) -> Any:
    options = state.compile_options
    assert options is not None
    key = (base, repr(sorted(options.items())))  # torch.compile takes options that cannot be hashed
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(base.forward, **options)
    return functools.partial(_COMPILED[key], block)


def _swap(module: Any, kind: type, state: Attachment, **extra: Any) -> None:
    own: Any = type(module)
    module.__class__ = _subclass(kind, own)
    module.__dict__.update({_STATE: state, **{f"_diffratio_{key}": value for key, value in extra.items()}})


def _unswap(module: Any) -> None:
    if isinstance(module, _Converted):
        module.__class__ = _base(type(module))
        for key in [key for key in module.__dict__ if key.startswith(_STATE)]:
            del module.__dict__[key]


def attachment(transformer: nn.Module) -> Attachment:
    """What is attached to a transformer.

    Raises:
        DiffratioError: nothing is.
    """
    state = transformer.__dict__.get(_STATE)
    if state is None:
        raise DiffratioError(f"nothing is applied to {type(transformer).__name__}; diffratio.apply_ a method first")
    assert isinstance(state, Attachment)
    return state


def is_applied(transformer: nn.Module) -> bool:
    """Whether a method is attached."""
    return _STATE in transformer.__dict__


def describe(transformer: nn.Module) -> Description:
    """Analytic costs of a transformer, converted or not."""
    return backbone_of(transformer).describe(transformer)


def apply_(transformer: Any, config: MethodConfig | Sequence[MethodConfig], seed: int = 0) -> Any:
    """Puts one method, or a step-level and a token-level one, into a transformer, in place.

    Args:
        transformer: a diffusers transformer of a known family, or a pipeline that holds one.
        config: a method config such as `diffratio.ToMe(ratio=0.5)`, or several, outermost first.
        seed: seed of the methods' draws.

    Returns:
        What was given.

    Raises:
        DiffratioError: no backbone matches, something is applied already, or two token-level methods were given.

    Example:
        >>> import diffratio
        >>> transformer = diffratio.backbones.get_backbone("dit").tiny()
        >>> _ = diffratio.apply_(transformer, diffratio.ToMe(ratio=0.5))
    """
    if not isinstance(transformer, nn.Module) and hasattr(transformer, "transformer"):
        apply_(transformer.transformer, config, seed)
        return transformer
    backbone = backbone_of(transformer)
    if is_applied(transformer):
        present = ", ".join(method.name for method in attachment(transformer).methods)
        raise DiffratioError(f"{present} is applied to this transformer already; diffratio.remove_ it first")
    configs = [config] if isinstance(config, MethodConfig) else list(config)
    if not configs or not all(isinstance(one, MethodConfig) for one in configs):
        raise DiffratioError(f"apply_ takes a method config such as diffratio.ToMe(ratio=0.5), got {config!r}")
    description = backbone.describe(transformer)
    methods = [one.method(one, description) for one in configs]
    token_level = [method.name for method in methods if method.token_level]
    if len(token_level) > 1:
        raise DiffratioError(f"two token-level methods ({' and '.join(token_level)}) cannot share a transformer")
    methods.sort(key=lambda method: method.token_level)
    for site in methods[-1].sites():
        if site not in backbone.sites:
            raise DiffratioError(
                f"{methods[-1].name}: backbone {backbone.name} has no site {site!r}; it has {', '.join(backbone.sites)}"
            )
    state = Attachment(backbone, methods, backbone.prepare_(transformer), seed)
    reference = next(transformer.parameters())
    for layer, block in enumerate(backbone.blocks(transformer)):
        for site in methods[-1].sites():
            _swap(block.get_submodule(backbone.sites[site]), _Site, state, layer=layer, site=site)
        _swap(block, _Block, state, layer=layer)
    for method in methods:
        for layer, module in enumerate(method.block_modules() or []):
            backbone.blocks(transformer)[layer].router = module.to(reference.device)
        for name, module in method.root_modules().items():
            setattr(transformer, name, module.to(reference.device))
            state.added += (name,)
    _swap(transformer, _Transformer, state)
    return transformer


def remove_(transformer: Any) -> Any:
    """Takes everything out again, exactly; parameters that a method added are dropped.

    Raises:
        DiffratioError: nothing is applied.
    """
    if not isinstance(transformer, nn.Module) and hasattr(transformer, "transformer"):
        detach_(transformer)
        remove_(transformer.transformer)
        return transformer
    state = attachment(transformer)
    for name in state.added:
        drop_root_module_(transformer, name)
    for method in state.methods:
        if method.block_modules() is not None:
            for block in state.backbone.blocks(transformer):
                del block.router
    state.backbone.undo_(transformer, state.prepared)
    for module in list(transformer.modules()):
        _unswap(module)
    return transformer


def compile_(transformer: nn.Module, **options: Any) -> nn.Module:
    """Compiles the inner blocks: one function for all of them, `torch.compile` options as given.

    With `dynamic=True` one graph serves every number of kept tokens.
    """
    attachment(transformer).compile_options = {"dynamic": True} | options
    return transformer


def drop_root_module_(transformer: nn.Module, name: str) -> None:
    """Unregisters a module that a method no longer needs (frozen keep ratios)."""
    if name in dict(transformer.named_children()):
        delattr(transformer, name)


class _Scheduler(_Converted):
    """A scheduler that opens a run at set_timesteps and advances it at step."""

    _diffratio_transformer: Any

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        result = super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        if _STATE not in self.__dict__:  # made anew by from_config of this class: tied to nothing
            return result
        transformer, state = self._diffratio_transformer, self._diffratio
        timesteps: Tensor = self.timesteps  # type: ignore[attr-defined]
        config: Any = self.config  # type: ignore[attr-defined]
        if config.get("prediction_type") == "flow_prediction":  # its timesteps are cut to integers, its sigmas are not
            timesteps = self.sigmas[: len(timesteps)] * config.num_train_timesteps  # type: ignore[attr-defined]
        levels = tuple(state.backbone.noise_level(timesteps.detach().cpu()).clamp(0, 1).tolist())
        state.open_run(SamplingRun(levels, state.backbone.grid(transformer)))
        return result

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        state = self.__dict__.get(_STATE)
        if state is None:
            return result
        state.step += 1
        if state.run is not None and state.step >= state.run.steps:
            state.close_run()
        return result


_KINDS = (_Transformer, _Block, _Site, _Scheduler)


def attach_(pipe: Any) -> Any:
    """Ties a diffusers pipeline to the methods in its transformer.

    From now on its scheduler's `set_timesteps` opens a run and `step` advances it: regions are Python numbers and
    nothing waits for the device inside the sampling loop.

    Raises:
        DiffratioError: the pipeline has no transformer with a method applied.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise DiffratioError(f"{type(pipe).__name__} holds no transformer; attach_ takes a diffusers DiT pipeline")
    state = attachment(transformer)
    if isinstance(pipe.scheduler, _Scheduler):
        _unswap(pipe.scheduler)
    _swap(pipe.scheduler, _Scheduler, state, transformer=transformer)
    return pipe


def detach_(pipe: Any) -> Any:
    """Unties a pipeline; the transformer keeps its methods."""
    if isinstance(pipe.scheduler, _Scheduler):
        pipe.scheduler._diffratio.close_run()
        _unswap(pipe.scheduler)
    return pipe


def _run_of(transformer: nn.Module, steps: int, guidance: bool, run: SamplingRun | None) -> SamplingRun:
    return run or backbone_of(transformer).default_run(transformer, steps, "cfg" if guidance else "none")


def macs(transformer: nn.Module, steps: int = 20, guidance: bool = True, run: SamplingRun | None = None) -> Cost:
    """Analytic MACs of a whole sampling run with what is applied.

    Args:
        transformer: dense or converted.
        steps: shorthand for the backbone's default run of so many steps.
        guidance: whether both guidance halves are computed.
        run: the run itself, instead of the two above.

    Returns:
        total, per block, planning and the fraction of the dense run.
    """
    run = _run_of(transformer, steps, guidance, run)
    if not is_applied(transformer):
        return Method(None, describe(transformer)).macs(run)
    state, adapted = attachment(transformer), run
    for method in state.methods[:-1]:
        adapted = method.adapt(adapted)
    cost = state.token_method.macs(adapted)
    return dataclasses.replace(cost, dense=state.token_method.description.dense(run))


def for_budget(
    method: str,
    transformer: nn.Module,
    budget: float,
    steps: int = 20,
    guidance: bool = True,
    run: SamplingRun | None = None,
) -> MethodConfig:
    """The config of a method that costs within [budget - 0.01, budget] of the dense run.

    Raises:
        BudgetUnreachable: with the reachable range.
        DiffratioError: unknown method, or a budget outside (0, 1].

    Example:
        >>> import diffratio
        >>> transformer = diffratio.backbones.get_backbone("dit").tiny()
        >>> diffratio.for_budget("fewer_steps", transformer, budget=0.8, steps=20)
        FewerSteps(keep=0.8)
    """
    cls = get_method(method)
    config = cls.for_budget(describe(transformer), _run_of(transformer, steps, guidance, run), check_budget(budget))
    assert isinstance(config, MethodConfig)
    return config


def summary(transformer: nn.Module, steps: int = 20, guidance: bool = True, run: SamplingRun | None = None) -> str:
    """What is attached, tokens before and after per site, and MACs, as text.

    Raises:
        DiffratioError: nothing is attached.
    """
    state = attachment(transformer)
    method = state.token_method
    run = method.adapt(_run_of(transformer, steps, guidance, run))
    cost = macs(transformer, run=run)
    grid: TokenGrid = run.grid
    lines = [
        f"{type(transformer).__name__} ({state.backbone.name}), {grid.height}x{grid.width} tokens, "
        f"{run.steps} steps, guidance {run.guidance}",
        "method: " + ", ".join(repr(one.config) for one in state.methods),
        f"MACs: {cost.total / 1e9:.3f} G of {cost.dense / 1e9:.3f} G dense ({cost.fraction:.3f}), "
        f"planning {cost.planning / max(cost.total, 1):.2%}",
    ]
    for layer, block in enumerate(method.description.blocks):
        parts = []
        for site in block.sites:
            kept = []
            for step in range(run.steps):
                use = method.use(layer, step, run)
                dense = (grid.tokens, grid.tokens)
                kept.append(0 if use.bypassed else (use.tokens or {}).get(site.name, dense)[0])
            low, high = min(kept), max(kept)
            parts.append(f"{site.name} {grid.tokens} -> {low}" + (f"..{high}" if high != low else ""))
        lines.append(f"  block {layer:2d}: " + ", ".join(parts))
    return "\n".join(lines)
