"""Ties a diffusers pipeline to the methods in its transformer: scheduler and call are swapped in place."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from diffratio.cost.run import Guidance, Halves, SamplingRun
from diffratio.errors import DiffratioError, unknown
from diffratio.surgery.state import Attachment, attachment
from diffratio.surgery.swap import STATE, Converted, base_of, bound, swap, unswap

_SCALE, _TRUE_SCALE = "guidance_scale", "true_cfg_scale"


class SchedulerMixin(Converted):
    """A scheduler that opens a run at set_timesteps, of the steps from set_begin_index on, and advances it at step."""

    signed = ("set_timesteps", "step")  # pipelines read there whether they take sigmas, eta, a generator
    _diffratio_transformer: Any
    _diffratio_whole: SamplingRun  # as set_timesteps opened it

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        result = super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        if STATE not in self.__dict__:  # made anew by from_config of this class: tied to nothing
            return result
        transformer, state = self._diffratio_transformer, self._diffratio
        timesteps: Tensor = self.timesteps  # type: ignore[attr-defined]
        config: Any = self.config  # type: ignore[attr-defined]
        if (
            config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        ):  # its timesteps are cut to integers, its sigmas are not
            timesteps = self.sigmas[: len(timesteps)] * config.num_train_timesteps  # type: ignore[attr-defined]
        levels = tuple(state.backbone.scheduler_level(timesteps.detach().cpu()).clamp(0, 1).tolist())
        guidance: Guidance = "none" if state.halves == "one" else "cfg"
        grid, text = state.backbone.grid(transformer), state.backbone.text_tokens(transformer)
        self._diffratio_whole = SamplingRun(levels, grid, guidance, text)
        state.open_run(self._diffratio_whole, provisional=True)
        return result

    def set_begin_index(self, begin_index: int = 0) -> None:
        """As the base class's, where it has one: image-to-image pipelines begin inside the schedule."""
        base: Any = super()
        if hasattr(base, "set_begin_index"):
            base.set_begin_index(begin_index)
        whole, state = self.__dict__.get(f"{STATE}_whole"), self.__dict__.get(STATE)
        if whole is None or state is None or not (state.provisional and state.run is not None):
            return
        left = whole.noise_levels[begin_index:]
        if left:
            state.open_run(replace(whole, noise_levels=left), provisional=True)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        result = super().step(*args, **kwargs)  # type: ignore[misc]
        state = self.__dict__.get(STATE)
        if state is None:
            return result
        state.step += 1
        if state.run is not None and state.step >= state.run.steps:
            state.close_run()
        return result


class PipelineMixin(Converted):
    """A pipeline whose call says whether its batches hold two guidance halves."""

    _diffratio_order: Halves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        call = super().__call__  # type: ignore[misc]
        state: Attachment | None = self.__dict__.get(STATE)
        if state is None:
            return call(*args, **kwargs)
        function = base_of(type(self)).__call__
        default = inspect.signature(function).parameters[_SCALE].default
        arguments = bound(function, args, kwargs)
        scale = arguments.get(_SCALE, default)
        _check_separate(state, arguments)
        before = state.halves
        # every diffusers pipeline with classifier-free guidance turns it on above 1
        state.halves = self._diffratio_order if scale is not None and scale > 1 else "one"
        try:
            return call(*args, **kwargs)
        finally:
            state.halves = before
            state.close_run()


def _check_separate(state: Attachment, arguments: dict[str, Any]) -> None:
    """Raises DiffratioError for two forwards a step, guidance beside the distilled one, under a method with state."""
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if not negative or (arguments.get(_TRUE_SCALE) or 1) <= 1:
        return
    for method in state.methods:
        if method.stateful:
            raise DiffratioError(
                f"{method.name} keeps state from step to step, and {_TRUE_SCALE} above 1 makes two forwards of every "
                f"step: leave {_TRUE_SCALE} at 1, or take a method without state"
            )


def attach_(pipe: Any, halves: Halves | None = None) -> Any:
    """Ties a diffusers pipeline to the methods in its transformer.

    From now on its scheduler's `set_timesteps` opens a run and `step` advances it: regions are Python numbers and
    nothing waits for the device inside the sampling loop. Its call says whether there is guidance.

    Args:
        pipe: a pipeline, or anything with `transformer` and `scheduler` whose loop is your own.
        halves: how the loop's batches hold the guidance halves: `cond_first`, `uncond_first` (both in one batch),
            `cond`, `uncond` (a forward each) or `one` (no guidance). None takes the order of the family's pipelines,
            which say by `guidance_scale` whether there is guidance; a loop of your own then says nothing.

    Raises:
        DiffratioError: the pipeline has no transformer with a method applied, or an unknown `halves`.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise DiffratioError(f"{type(pipe).__name__} holds no transformer; attach_ takes a diffusers DiT pipeline")
    if halves is not None and halves not in get_args(Halves):
        raise unknown("halves", halves, get_args(Halves))
    state = attachment(transformer)
    detach_(pipe)
    if callable(pipe) and _SCALE in inspect.signature(type(pipe).__call__).parameters:
        swap(pipe, PipelineMixin, state, order=halves or state.backbone.guidance_order)
    else:
        state.halves = halves
    swap(pipe.scheduler, SchedulerMixin, state, transformer=transformer)
    return pipe


def detach_(pipe: Any) -> Any:
    """Unties a pipeline; the transformer keeps its methods."""
    if isinstance(pipe.scheduler, SchedulerMixin):
        state = pipe.scheduler.__dict__[STATE]
        state.close_run()
        state.halves = None
        unswap(pipe.scheduler)
    unswap(pipe)
    return pipe
