"""What a search is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from diffratio.errors import DiffratioError, unknown
from diffratio.files import configs_folder
from diffratio.methods.step_schedule import ACTIONS, COMPUTE, HIGHEST, REUSE
from diffratio.plain import MOST, typed, whole

METHODS = ("dato", "fewer_steps")
ERRORS = ("mse", "features")


@dataclass(frozen=True)
class SearchSettings:
    """What `configs/search.yaml` holds.

    Args:
        weights: dense checkpoint that the schedules are for.
        out: folder of the search; the same command goes on with an unfinished one.
        method: `dato`, or `fewer_steps`: steps are computed in full or dropped.
        steps: S, of the run.
        n: samples of each evaluation; more is more exact and takes as much longer.
        generations: populations that are evaluated, the first one included.
        population: schedules in each.
        seed: of the search and of its noise.
        actions: that steps may take, among C, S, E, R, X; C must be one of them.
        ratios: fractions of the tokens that a computed step may prune, beside 0; empty prunes nothing.
        error: `mse` of the images in [-1, 1], or of their EfficientNet-Lite0 `features`.
        held_out_n: samples on other noise, on which the front and the baselines are compared at the end.
        guidance_scale: of the sampling; 1 or below evaluates the conditional half alone.
        batch_size: samples of a forward.
        prompts: texts in turn, for text-conditional models; empty takes the checkpoint's own.
        parts: dense pipeline with the text encoder and VAE that the checkpoint lacks.
        device: `auto`, `cpu` or a CUDA device.
    """

    weights: str
    out: str
    method: str = "dato"
    steps: int = 20
    n: int = 16
    generations: int = 8
    population: int = 24
    seed: int = 0
    actions: tuple[str, ...] = tuple(ACTIONS)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    error: str = "mse"
    held_out_n: int = 16
    guidance_scale: float = 2.0
    batch_size: int = 32
    prompts: tuple[str, ...] = ()
    parts: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        least = {"steps": 2, "n": 1, "generations": 1, "population": 4, "seed": 0, "held_out_n": 1, "batch_size": 1}
        for name, lowest in least.items():
            whole(f"search: {name}", getattr(self, name), lowest, 2**31 if name == "seed" else MOST)
        if self.guidance_scale < 0:
            raise DiffratioError(f"search: guidance_scale={self.guidance_scale:g} must be at least 0; 1 is none")
        for value, allowed, what in ((self.method, METHODS, "method to search"), (self.error, ERRORS, "search error")):
            if value not in allowed:
                raise unknown(what, value, allowed)
        for name in ("actions", "ratios"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise DiffratioError(f"search: {name}={list(values)} names one twice")
        for action in self.actions:
            if action not in ACTIONS:
                raise unknown("action", action, ACTIONS)
        for ratio in self.ratios:
            if not 0 < ratio <= HIGHEST:
                raise DiffratioError(
                    f"search: ratio {ratio!r} is outside (0, {HIGHEST}]; it is a fraction of tokens pruned, and 0 is "
                    "always among them"
                )
        if COMPUTE not in self.actions:
            raise DiffratioError(f"search: actions={list(self.actions)} lacks C; step 0 is computed")
        if len(self.allowed_actions) == 1 and not self.allowed_ratios:
            raise DiffratioError("search: with C alone and no ratios there is one schedule; add an action or a ratio")

    @property
    def allowed_actions(self) -> tuple[str, ...]:
        """Actions of the method, in the order of the alphabet."""
        allowed = (COMPUTE, REUSE) if self.method == "fewer_steps" else self.actions
        return tuple(action for action in ACTIONS if action in allowed)

    @property
    def allowed_ratios(self) -> tuple[float, ...]:
        """Ratios beside 0 of the method, rising."""
        return () if self.method == "fewer_steps" else tuple(sorted(self.ratios))

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> SearchSettings:
        """From plain data; lists become tuples, and keys that are not the search's own are left out.

        Raises:
            DiffratioError: a missing key, or a value of another type.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = _method(cfg["method"]) if field.name == "method" and "method" in cfg else cfg.get(field.name)
            if field.name not in cfg or (value is None and field.default is not None):
                raise DiffratioError(f"search needs {field.name}={field.name.upper()}")
            values[field.name] = value
        return typed(cls, values)


def _method(given: Any) -> Any:
    """The name; of a whole member of the config group too, whose other keys a search does not take."""
    if not isinstance(given, Mapping):
        return given
    name = given.get("name", "")
    if name in METHODS and given != yaml.safe_load((configs_folder() / "method" / f"{name}.yaml").read_text("utf-8")):
        raise DiffratioError(f"search takes method={name} alone; leave method.KEY out, the search decides about steps")
    return name
