"""Schedulers by name: which diffusers class samples which objective, and with which settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffratio.errors import DiffratioError, first_line, unknown

OBJECTIVES = ("flow", "flow_sample", "noise")
_DEFAULT = {"flow": "flow_euler", "flow_sample": "dpm_solver", "noise": "ddim"}

# What the objective decides; an option must not contradict it.
_FIXED = ("prediction_type", "use_flow_sigmas")


@dataclass(frozen=True)
class Sampler:
    """One named sampler.

    Args:
        scheduler: class in diffusers.
        settings: for each objective that it can sample, what differs from the defaults of the class.
        withheld: options of the class that are not offered.
    """

    scheduler: str
    settings: Mapping[str, Mapping[str, Any]]
    withheld: tuple[str, ...] = ()


# The noise settings are DiT's: linear betas, 1000 steps, no clipping. "trailing" starts at the noisiest step whatever
# the number of steps, "leading" (diffusers' default) starts 20 steps at t = 950 though the input is pure noise.
SAMPLERS: Mapping[str, Sampler] = {
    "flow_euler": Sampler("FlowMatchEulerDiscreteScheduler", {"flow": {}}, ("use_dynamic_shifting", "invert_sigmas")),
    "ddpm": Sampler("DDPMScheduler", {"noise": {"clip_sample": False, "timestep_spacing": "trailing"}}),
    "ddim": Sampler("DDIMScheduler", {"noise": {"clip_sample": False, "timestep_spacing": "trailing"}}),
    # Its learned-variance path keeps the first three channels of the prediction, whatever their number.
    "dpm_solver": Sampler(
        "DPMSolverMultistepScheduler",
        {
            "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            "flow_sample": {"use_flow_sigmas": True, "prediction_type": "sample"},
            "noise": {},
        },
        ("variance_type", "use_dynamic_shifting"),
    ),
}


def make_scheduler(sampler: str, objective: str = "flow", **options: Any) -> Any:
    """Builds the diffusers scheduler that samples a model.

    Args:
        sampler: `flow_euler`, `ddpm`, `ddim` (deterministic: eta 0) or `dpm_solver` (second-order multistep).
        objective: what the model predicts. `flow`: e - x0 on x_t = (1 - t) x0 + t e, its timestep input is 1000 t;
            `flow_sample`: x0 there; `noise`: e under DiT's linear betas.
        **options: further settings of the scheduler. `shift` (> 0) moves flow steps toward noise where it is above 1;
            `clip_sample=True` clips predicted pictures to [-1, 1] (pixel models); `variance_type="learned_range"` uses
            a learned variance (ddpm).

    Returns:
        A diffusers scheduler.

    Raises:
        DiffratioError: an unknown sampler, objective or option, or a sampler that cannot sample the objective.

    Example:
        >>> make_scheduler("flow_euler", shift=3.0).config.shift
        3.0
    """
    import diffusers

    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    entry = SAMPLERS[sampler]
    if objective not in entry.settings:
        able = [name for name, other in SAMPLERS.items() if objective in other.settings]
        raise DiffratioError(
            f"sampler {sampler!r} cannot sample a model trained for {objective!r}: choose one of {', '.join(able)}"
        )
    kind = getattr(diffusers, entry.scheduler)
    allowed = set(inspect.signature(kind.__init__).parameters) - {"self", *_FIXED, *entry.withheld}
    if sampler == "dpm_solver" and objective != "noise":
        allowed.add("shift")
    for name in options:
        if name not in allowed:
            raise unknown(f"option of sampler {sampler!r}", name, allowed)
    for name in ("shift", "flow_shift"):
        if name in options and not options[name] > 0:
            raise DiffratioError(f"{name} must be above 0 (1 spreads the steps evenly), got {options[name]!r}")
    if sampler == "dpm_solver" and "shift" in options:
        options["flow_shift"] = options.pop("shift")
    try:
        return kind(**{**entry.settings[objective], **options})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DiffratioError(f"sampler {sampler!r} with {options}: {error}") from None


def default_sampler(objective: str) -> str:
    """The deterministic sampler that an objective's models are sampled with unless something else is asked for."""
    return _DEFAULT[objective]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler walks the straight path x_t = (1 - t) x0 + t e."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def objective_of(scheduler: Any) -> str:
    """What the models that a scheduler samples predict, as in `OBJECTIVES`."""
    if not is_flow(scheduler):
        return "noise"
    return "flow_sample" if scheduler.config.get("prediction_type") == "sample" else "flow"


def takes_variance(scheduler: Any) -> bool:
    """Whether a scheduler's step uses a learned variance behind the mean; the others get the mean alone."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in ("learned", "learned_range")


def sampler_of(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """A scheduler in words: the name of its sampler and the settings that differ from its class's defaults.

    Example:
        >>> sampler_of(make_scheduler("flow_euler", shift=3.0))
        ('flow_euler', {'shift': 3.0})
    """
    kind = type(scheduler).__name__
    name = next((name for name, entry in SAMPLERS.items() if entry.scheduler == kind), kind)
    # along the bases: a scheduler that is tied to a method takes any arguments
    initial = next(base.__dict__["__init__"] for base in type(scheduler).__mro__ if "__init__" in base.__dict__)
    defaults = {key: one.default for key, one in inspect.signature(initial).parameters.items()}
    settings = {key: value for key, value in scheduler.config.items() if key in defaults and value != defaults[key]}
    return name, settings


def set_steps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> None:
    """Opens the timesteps of a run of `steps` steps, with one call of `scheduler.set_timesteps`.

    Flow matching with Euler steps gets the levels 1, 1 - 1/S, ..., 1/S (before the shift): left to itself, diffusers
    ends them at 1/1000 and spends the last step on nothing.

    Args:
        scheduler: a diffusers scheduler.
        steps: evaluated steps S.
        device: where the timesteps go; None leaves them on the host, which keeps the loop free of synchronisation.

    Raises:
        DiffratioError: fewer than 1 step, more than the scheduler knows, or a number that it cannot space.
    """
    try:
        _set_steps(scheduler, steps, device)
    except DiffratioError:
        raise
    except Exception as error:  # what diffusers raises on settings that contradict each other
        raise DiffratioError(
            f"{type(scheduler).__name__} with its settings cannot space {steps} steps: {first_line(error)}"
        ) from None


def _set_steps(scheduler: Any, steps: int, device: torch.device | str | None) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    most = int(scheduler.config.num_train_timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise DiffratioError(f"steps must be a whole number from 1 to {most}, got {steps!r}")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if scheduler.config.use_dynamic_shifting:
            raise DiffratioError(
                "use_dynamic_shifting needs a shift for each picture size, which this pipeline does not know: "
                "set use_dynamic_shifting=False and give shift"
            )
        scheduler.set_timesteps(sigmas=[(steps - i) / steps for i in range(steps)], device=device)
    elif _overshoots(scheduler, steps):
        if not isinstance(scheduler, DDPMScheduler):
            raise DiffratioError(
                f"{type(scheduler).__name__} cannot space {steps} steps with timestep_spacing='trailing' (it adds one "
                f"at a negative timestep): take {steps - 1} steps or timestep_spacing='leading'"
            )
        scheduler.set_timesteps(timesteps=[round(most - i * most / steps) - 1 for i in range(steps)], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


def _overshoots(scheduler: Any, steps: int) -> bool:
    """Whether diffusers' floating-point range of trailing timesteps comes out one too long, as at 61 of 1000 steps."""
    most = scheduler.config.num_train_timesteps
    return scheduler.config.get("timestep_spacing") == "trailing" and math.ceil(most / (most / steps)) != steps


def model_timesteps(scheduler: Any) -> Tensor:
    """What the transformer is given as its timestep at every evaluated step, (S,).

    1000 sigma as float32 for flow (DPM-Solver's own timesteps are cut to integers, its sigmas are not), else the
    scheduler's timesteps.
    """
    if is_flow(scheduler):
        sigmas = scheduler.sigmas[: len(scheduler.timesteps)]
        return sigmas.to(torch.float32) * scheduler.config.num_train_timesteps
    return scheduler.timesteps


def noise_levels(scheduler: Any) -> tuple[float, ...]:
    """Noise level u in [0, 1] of every evaluated step in the order of evaluation, after `set_steps`."""
    most = scheduler.config.num_train_timesteps
    return tuple(min(1.0, max(0.0, t / most)) for t in model_timesteps(scheduler).double().tolist())
