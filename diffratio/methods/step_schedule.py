"""Step schedules: what is done with each step of a run, as found by a search or written by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from diffratio.cost.macs import Description
from diffratio.cost.run import MOST_STEPS, SamplingRun
from diffratio.errors import DiffratioError, shortened
from diffratio.files import write_json

FORMAT, VERSION = "diffratio step schedule", 1
COMPUTE, SKIP, EXTRAPOLATE, REUSE, CONTINUE = "C", "S", "E", "R", "X"
ACTIONS = {
    COMPUTE: "compute",
    SKIP: "skip blocks and add their stored residual",
    EXTRAPOLATE: "the same with the residual extrapolated",
    REUSE: "reuse the last output",
    CONTINUE: "extrapolate the last two outputs",
}
REUSING = (REUSE, CONTINUE)  # nothing is computed
EXTRAPOLATING = {EXTRAPOLATE: SKIP, CONTINUE: REUSE}  # and what each is until two steps were computed
HIGHEST = 0.75  # most that is pruned: a quarter of the tokens are base tokens
FURTHEST = 4  # a schedule is carried over to at most so many times more, or fewer, steps


@dataclass(frozen=True)
class StepChoice:
    """What is done with one step.

    Args:
        action: `C` compute, `S` skip blocks and add their stored residual, `E` the same with the residual extrapolated,
            `R` reuse the last output, `X` extrapolate it from the last two computed ones.
        ratio: fraction of the image tokens pruned in a computed step, 0..0.75; higher prunes more.
    """

    action: str = COMPUTE
    ratio: float = 0.0

    def __post_init__(self) -> None:
        check_action(self.action, "step schedule")
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not number or not 0 <= self.ratio <= HIGHEST:
            raise DiffratioError(
                f"step schedule: ratio {self.ratio!r} is outside [0, {HIGHEST}]: it is the fraction of tokens pruned, "
                "and a quarter of them are base tokens"
            )
        if self.action != COMPUTE and self.ratio:
            raise DiffratioError(f"step schedule: ratio {self.ratio!r} at action {self.action}; only C prunes")


def check_action(action: Any, where: str) -> None:
    """Raises DiffratioError for what is not one of the letters."""
    if not isinstance(action, str) or action not in ACTIONS:
        meanings = ", ".join(f"{letter} ({meaning})" for letter, meaning in ACTIONS.items())
        raise DiffratioError(f"{where}: unknown action {shortened(action)}; known are {meanings}")


def check_actions(actions: Sequence[str], where: str) -> None:
    """Raises DiffratioError unless all are known and the first one computes."""
    for action in actions:
        check_action(action, where)
    if not actions or actions[0] != COMPUTE:
        found = repr(actions[0]) if actions else "none"
        raise DiffratioError(f"{where}: the action of step 0 is {found} and must be C: nothing is stored before it")


@dataclass(frozen=True)
class StepSchedule:
    """An action and a ratio for each step, with the run and the model that they were found on.

    Args:
        choices: by step, noisiest first; step 0 is computed.
        noise_levels: noise level u in [0, 1] of each of these steps.
        family: backbone of the model.
        layers: its blocks.
        width: its channels.
        weights_sha256: of the weights that it was found on; None where it was written by hand.
    """

    choices: tuple[StepChoice, ...]
    noise_levels: tuple[float, ...]
    family: str
    layers: int
    width: int
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "noise_levels", tuple(float(u) for u in self.noise_levels))
        if len(self.choices) > MOST_STEPS:
            raise DiffratioError(
                f"step schedule: it has {len(self.choices):,} steps, and at most {MOST_STEPS:,} are taken"
            )
        check_actions([one.action for one in self.choices], "step schedule")
        if len(self.noise_levels) != len(self.choices):
            raise DiffratioError(
                f"step schedule: {len(self.choices)} steps and {len(self.noise_levels)} noise levels; give one for each"
            )
        if any(not 0 <= u <= 1 for u in self.noise_levels):
            raise DiffratioError(f"step schedule: noise levels must lie in [0, 1], got {shortened(self.noise_levels)}")
        if not isinstance(self.family, str) or not isinstance(self.weights_sha256, str | None):
            raise DiffratioError("step schedule: family and weights_sha256 of the model must be text")
        for name, value in (("layers", self.layers), ("width", self.width)):
            if type(value) is not int or value < 1:
                raise DiffratioError(f"step schedule: {name} of the model must be an integer from 1, got {value!r}")

    @classmethod
    def made_for(
        cls,
        description: Description,
        run: SamplingRun,
        actions: Sequence[str],
        ratios: Sequence[float] | None = None,
        weights_sha256: str | None = None,
    ) -> StepSchedule:
        """A schedule of a run of a model.

        Args:
            description: the model.
            run: its noise levels are the steps.
            actions: one letter a step.
            ratios: pruned fraction of each step, 0 where nothing is computed; None prunes nothing.
            weights_sha256: of the weights.

        Example:
            >>> from diffratio.cost.run import uniform_run
            >>> from diffratio.tokens import TokenGrid
            >>> from diffratio.cost.macs import BlockCost
            >>> model = Description("dit", 16, (BlockCost(()),) * 3, per_token=0, fixed=0)
            >>> schedule = StepSchedule.made_for(model, uniform_run(4, TokenGrid(4, 4)), "CSCR", (0.5, 0, 0, 0))
            >>> [choice.action for choice in schedule.over(8)]
            ['C', 'C', 'S', 'S', 'C', 'C', 'R', 'R']
        """
        given = (0.0,) * len(actions) if ratios is None else tuple(ratios)
        if len(given) != len(actions):
            raise DiffratioError(f"step schedule: {len(actions)} actions and {len(given)} ratios; give one for each")
        return cls.of(actions, run.noise_levels, *_model(description), ratios=given, weights_sha256=weights_sha256)

    @classmethod
    def of(
        cls,
        actions: Sequence[str],
        noise_levels: Sequence[float],
        family: str,
        layers: int,
        width: int,
        ratios: Sequence[float] | None = None,
        weights_sha256: str | None = None,
    ) -> StepSchedule:
        """`made_for` where steps and model are given by number."""
        given = (0.0,) * len(actions) if ratios is None else tuple(ratios)
        choices = tuple(StepChoice(action, ratio) for action, ratio in zip(actions, given, strict=True))
        return cls(choices, tuple(noise_levels), family, layers, width, weights_sha256)

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.choices)

    def require(self, description: Description, weights_sha256: str | None = None) -> StepSchedule:
        """The schedule itself.

        Args:
            description: the model at hand.
            weights_sha256: its weights' digest (`surgery.weights_digest`); None compares no weights, and a schedule
                without one fits any.

        Raises:
            DiffratioError: it was made for another model, or found on other weights.
        """
        own, other = (self.family, self.layers, self.width), _model(description)
        if own != other:
            raise DiffratioError(
                f"step schedule of {own[0]} with {own[1]} blocks of width {own[2]} does not fit {other[0]} with "
                f"{other[1]} blocks of width {other[2]}; search or write one for this model"
            )
        if weights_sha256 is not None and self.weights_sha256 not in (None, weights_sha256):
            raise DiffratioError(
                f"step schedule found on weights {str(self.weights_sha256)[:12]}, and these are {weights_sha256[:12]}; "
                "search on these, or give the checkpoint that it was found on"
            )
        return self

    def over(self, steps: int) -> tuple[StepChoice, ...]:
        """The schedule carried over to another number of steps, by normalised time i / S.

        The share of computed steps stays what it is, to within one step, everywhere in the run: a step computes where
        the count of computed steps so far, scaled, passes a whole number. What a step does otherwise, and how much it
        prunes, is that of the nearest step of its kind.

        Raises:
            DiffratioError: more than 4 times as many steps as the schedule has, or fewer than a quarter.
        """
        if not self.steps <= FURTHEST * steps <= FURTHEST**2 * self.steps:
            low, high = -(-self.steps // FURTHEST), FURTHEST * self.steps
            raise DiffratioError(
                f"step schedule of {self.steps} steps is carried over to {low} to {high} steps, and this run has "
                f"{steps}; search or write one for it"
            )
        return _over(self.choices, steps)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        rows = zip(self.choices, self.noise_levels, strict=True)
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "family": self.family,
                "layers": self.layers,
                "width": self.width,
                "weights_sha256": self.weights_sha256,
            },
            "steps": [{"noise_level": u, "action": one.action, "ratio": one.ratio} for one, u in rows],
        }

    @classmethod
    def from_json(cls, document: Any) -> StepSchedule:
        """Raises DiffratioError where the document is not a step schedule of this version."""
        try:
            if document["format"] != FORMAT:
                raise DiffratioError(f"not a step schedule: format {document['format']!r} is not {FORMAT!r}")
            if document["version"] != VERSION:
                raise DiffratioError(
                    f"step schedule of version {document['version']!r}; this diffratio reads version {VERSION}"
                )
            model, rows = document["model"], document["steps"]
            return cls(
                tuple(StepChoice(row["action"], row.get("ratio", 0.0)) for row in rows),
                tuple(float(row["noise_level"]) for row in rows),
                model["family"],
                model["layers"],
                model["width"],
                model.get("weights_sha256"),
            )
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, DiffratioError):
                raise
            raise DiffratioError(f"not a step schedule: {type(error).__name__} {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the JSON file that `schedule=PATH` reads."""
        write_json(path, self.to_json())


def load_step_schedule(path: str | Path, budget: float | None = None) -> StepSchedule:
    """Reads what `StepSchedule.save` wrote, or one schedule of what `diffratio search` found.

    Args:
        path: the schedule's file, or the front's file or folder.
        budget: of a front the dearest schedule within this fraction of the dense MACs is taken.

    Raises:
        DiffratioError: no such file, not a step schedule, or a front without a budget.
        BudgetUnreachable: of a front every schedule costs more.
    """
    from diffratio.methods.step_front import StepFront, read_schedules  # which holds schedules

    found = read_schedules(path)
    return found.within(budget).schedule if isinstance(found, StepFront) else found


def _model(description: Description) -> tuple[str, int, int]:
    return description.family, description.layers, description.width


@functools.lru_cache(maxsize=64)
def _over(choices: tuple[StepChoice, ...], steps: int) -> tuple[StepChoice, ...]:
    own, found = len(choices), []
    if own == steps:
        return choices
    for step in range(steps):
        start, end = Fraction(step * own, steps), Fraction((step + 1) * own, steps)
        before, after = (_computed(choices, place) * steps / own for place in (start, end))
        computes = math.ceil(after) > math.ceil(before)
        found.append(_nearest(choices, (start + end) / 2, computes))
    return tuple(found)


def _computed(choices: Sequence[StepChoice], place: Fraction) -> Fraction:
    """Computed steps up to a place in [0, S]; within a step they grow evenly."""
    whole = int(place)
    count = Fraction(sum(one.action == COMPUTE for one in choices[:whole]))
    return count + (place - whole if whole < len(choices) and choices[whole].action == COMPUTE else 0)


def _nearest(choices: Sequence[StepChoice], place: Fraction, computes: bool) -> StepChoice:
    """The choice of that kind whose middle is nearest to a place; there is one, since it was counted."""
    kind = [step for step, one in enumerate(choices) if (one.action == COMPUTE) == computes]
    return choices[min(kind, key=lambda step: (abs(step + Fraction(1, 2) - place), step))]
