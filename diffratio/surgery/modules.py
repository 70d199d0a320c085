"""The mixins of a converted transformer, its blocks and its sites."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.methods.actions import Reuse, Skip
from diffratio.methods.base import BlockCall
from diffratio.methods.streams import Joint, Result, image_of, text_of
from diffratio.surgery.memory import Streams, conditional
from diffratio.surgery.state import BATCHED, Attachment
from diffratio.surgery.swap import Converted, base_of, bound
from diffratio.tokens.plan import AttentionPlan
from diffratio.tokens.positions import take_positions


class TransformerMixin(Converted):
    """Opens and closes a forward; reuses the last output, or evaluates the conditional half alone."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: what stands around its modules is put there anew."""
        super().__setstate__(state)  # type: ignore[misc]
        self._diffratio.attach(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        inner = super().forward  # type: ignore[misc]
        state: Attachment = self._diffratio
        arguments = bound(base_of(type(self)).forward, args, kwargs)
        for name, why in state.backbone.refused.items():
            if _given(arguments, name) is not None:
                raise DiffratioError(f"{name} does not go with a method on backbone {state.backbone.name}: {why}")
        context = state.begin(self, arguments)  # type: ignore[arg-type]
        held = state.halves or context.halves  # by the batch as it came
        batch = arguments["hidden_states"].shape[0]
        if isinstance(state.action, Reuse):
            level = context.noise_level if state.action.extrapolate else None
            return _wrapped(state.memory.output(batch, held, level), arguments)
        single = context.halves == "cond" and held in BATCHED
        if single:
            for name in state.backbone.batched:
                arguments[name] = conditional(arguments.get(name), held, batch)
        for method in state.methods:
            method.see(arguments["hidden_states"], context)
        output = inner(**arguments)
        prediction = output[0]
        for method in state.methods:
            method.end_step(prediction, context)
        if single:  # guidance between two equal predictions changes nothing
            prediction = torch.cat([prediction, prediction])
            output = _wrapped(prediction, arguments)
        if context.run is not None:
            state.memory.keep_output(prediction, held, context.noise_level or 0.0)
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's; refused where parameters would be lost."""
        if any(method.learned for method in self._diffratio.methods):
            raise DiffratioError(
                "a routed transformer saved by diffusers would load again as a silently dense model; "
                "use diffratio.export(transformer, folder), or diffratio.remove_ it first"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def _given(arguments: Any, name: str) -> Any:
    """An argument by name, or an entry of a dictionary among them, `argument.entry`."""
    outer, _, entry = name.partition(".")
    value = arguments.get(outer)
    return value.get(entry) if entry and value is not None else value


def _wrapped(prediction: Tensor, arguments: dict[str, Any]) -> Any:
    """A prediction in the form that was asked for."""
    if not arguments.get("return_dict", True):
        return (prediction,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=prediction)


class BlockMixin(Converted):
    """Hands a block to the token-level method, or adds a stored residual instead."""

    _diffratio_layer: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        state: Attachment = self._diffratio
        context, layer = state.context, self._diffratio_layer
        base = base_of(type(self))
        if context is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        backbone, arguments = state.backbone, bound(base.forward, args, kwargs)
        entering: Streams = tuple(arguments.get(name) for name in backbone.streams)
        if isinstance(state.action, Skip) and state.action.covers(layer):
            if layer > state.action.first:  # the residual is already on it
                return _joined(entering)
            return _joined(state.memory.skip(state.action, entering, context.halves, context.noise_level or 0.0))
        for method in state.watching:
            method.ran(layer, "block", context)
        inner = super().forward if state.compile_options is None else _compiled(base, self, state)  # type: ignore[misc]
        attention = backbone.attention if state.owns_attention else None
        call = BlockCall(
            inner,
            arguments,
            backbone.hidden,
            backbone.per_token,
            backbone.per_sample,
            attention,
            backbone.streams,
            backbone.positions,
        )
        if not state.memory.depths or state.action is not None or context.run is None:
            return _joined(_leaving(state.token_method.run_block(layer, call, context), state))
        state.memory.enter(layer, entering)
        leaving = _leaving(state.token_method.run_block(layer, call, context), state)
        state.memory.leave(layer, leaving, context.halves, context.noise_level or 0.0)
        return _joined(leaving)


def _leaving(result: Result, state: Attachment) -> Streams:
    """A method's result by stream, in the block's own order."""
    streams, hidden = state.backbone.streams, state.backbone.hidden
    if isinstance(result, Joint) != (len(streams) > 1):
        raise DiffratioError(
            f"method {state.token_method.name} gives {'two streams' if isinstance(result, Joint) else 'image tokens'} "
            f"of a block, and those of backbone {state.backbone.name} return {' and '.join(streams)}: "
            "run_block must return what the call gave, or call.entering"
        )
    return tuple(image_of(result) if name == hidden else text_of(result) for name in streams)


def _joined(streams: Streams) -> Any:
    """Streams in the form in which a block returns them."""
    return streams[0] if len(streams) == 1 else streams


_COMPILED: dict[tuple[Any, ...], Any] = {}


def _compiled(base: Any, block: Any, state: Attachment) -> Any:
    options = state.compile_options
    assert options is not None
    # blocks of one class that hold other modules (SD3.5's second attention) have a limit of recompilations each
    holds = tuple((name, type(child)) for name, child in block.named_children())
    key = (base, holds, repr(sorted(options.items())))  # torch.compile takes options that cannot be hashed
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(_twin(base.forward), **options)
    return functools.partial(_COMPILED[key], block)


def _twin(function: Any) -> Any:
    """The same function with a code object of its own, by which torch counts recompilations."""
    code, name = function.__code__.replace(), function.__name__
    twin = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


class SiteMixin(Converted):
    """Runs a module inside a block on a plan's tokens."""

    _diffratio_layer: int
    _diffratio_site: str

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the base class's. Joint attention returns image and text tokens; a plan is about the image tokens.

        Where text and image tokens come as one, the text first, the plan is about the rows behind the text.
        """
        inner, context, x = super().forward, self._diffratio.context, hidden_states  # type: ignore[misc]
        if context is None:
            return inner(x, *args, **kwargs)
        for method in self._diffratio.watching:
            method.ran(self._diffratio_layer, self._diffratio_site, context)
        positions: str | None = self._diffratio.backbone.positions
        text = x.shape[1] - context.grid.tokens if positions is not None else 0
        image = x[:, text:] if text else x
        plan = self._diffratio.token_method.plan(self._diffratio_layer, self._diffratio_site, image, context)
        if plan is None:
            return inner(x, *args, **kwargs)
        given: dict[str, Any] = plan.arguments()
        if text and given:
            given["text_tokens"] = text
        if isinstance(plan, AttentionPlan):  # the attention processor gathers: queries and keys differ
            output = inner(x, *args, **kwargs, **given)
        else:
            if positions is not None and kwargs.get(positions) is not None:
                kwargs[positions] = take_positions(kwargs[positions], plan, image.shape[1])
            output = inner(_behind(x[:, :text], plan.reduce(image)), *args, **kwargs, **given)
        first, *rest = output if isinstance(output, tuple) else (output,)
        restored = _behind(first[:, :text], plan.restore(first[:, text:] if text else first, image))
        return (restored, *rest) if rest else restored


def _behind(text: Tensor, image: Tensor) -> Tensor:
    """Image tokens behind text tokens, of which there may be none."""
    return torch.cat([text.to(image.dtype), image], dim=1) if text.shape[1] else image
