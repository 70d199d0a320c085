"""Settings of `dato`, and what they make of a run."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from diffratio.cost.macs import Description
from diffratio.errors import DiffratioError, unknown
from diffratio.methods.base import MethodConfig
from diffratio.methods.block_cache import check_every
from diffratio.methods.intervals import computed
from diffratio.methods.merging import check_cells, check_count, check_number, whole
from diffratio.methods.step_schedule import ACTIONS, COMPUTE, HIGHEST, SKIP, StepChoice, StepSchedule
from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.pruning import CELL

MODES = ("both", "cache", "prune")
SCOPES = {
    "attn": ("self_attention",),
    "attn_q": ("self_attention",),
    "attn_ff": ("self_attention", "feed_forward"),
}
REFILLS = ("paper", "release")
FILLS = ("copy", "cached")
POLARITIES = ("high", "low", "random")
CACHED_ACTIONS = tuple(letter for letter in ACTIONS if letter != COMPUTE)


@dataclass(frozen=True)
class DaTo(MethodConfig):
    """Computed steps prune tokens that are like a base token, the most dynamic one of its cell; other steps are cached.

    Args:
        every: without a schedule, each n-th step is computed, from 1; higher computes fewer. Between two whole numbers
            both intervals occur.
        ratio: without a schedule, fraction of the image tokens pruned in computed steps, 0..0.75; higher prunes more.
        action: without a schedule, what the other steps do: `S` the first and last blocks run and the stored residual
            of the rest is added, `E` the same with the residual extrapolated, `R` the last output is reused,
            `X` the last two outputs are extrapolated.
        schedule: an action and a ratio for each step (a search's result); it takes the place of the three above.
        mode: `both`; `cache` prunes nothing, `prune` computes every step.
        scope: `attn` (self-attention), `attn_q` (its queries alone; keys and values stay full), `attn_ff` (the MLP
            too).
        refill: where a pruned token's result is copied from: `paper` the most similar base token, `release` the most
            similar kept token.
        fill: `copy`, or `cached`: pruned tokens take the module's output from when they were last computed. Step 0
            then prunes nothing.
        polarity: base tokens are those that change most (`high`), least (`low`), or by a drawn sign a step (`random`,
            as the release).
        noise: weight of a normal draw beside the change, which averages 1; higher moves base tokens more.
        first_blocks: blocks that cached steps run before the residual, from 0.
        last_blocks: blocks that they run after it, from 0.
        mix: computed steps take turns between the two whole numbers of pruned tokens next to ratio N, so that budgets
            are met finely.

    Source: arXiv 2501.00375; only the values are followed.
    """

    every: float = 2.0
    ratio: float = 0.5
    action: str = SKIP
    schedule: StepSchedule | None = None
    mode: str = "both"
    scope: str = "attn"
    refill: str = "paper"
    fill: str = "copy"
    polarity: str = "high"
    noise: float = 0.1
    first_blocks: int = 1
    last_blocks: int = 1
    mix: bool = False

    def __post_init__(self) -> None:
        check_every("dato", self.every)
        check_number("dato", "ratio", self.ratio, 0, HIGHEST, "a quarter of the tokens are base tokens")
        names = (
            ("action", CACHED_ACTIONS),
            ("mode", MODES),
            ("scope", tuple(SCOPES)),
            ("refill", REFILLS),
            ("fill", FILLS),
            ("polarity", POLARITIES),
        )
        for name, allowed in names:
            if getattr(self, name) not in allowed:
                raise unknown(f"dato {name}", getattr(self, name), allowed)
        if self.schedule is not None and not isinstance(self.schedule, StepSchedule):
            raise DiffratioError(
                f"dato: schedule {self.schedule!r} is no step schedule; diffratio.load_step_schedule(path) reads one"
            )
        check_number("dato", "noise", self.noise, 0, 100, "it is the weight of a normal draw")
        check_count("dato", "first_blocks", self.first_blocks, 0, "blocks before the skipped ones")
        check_count("dato", "last_blocks", self.last_blocks, 0, "blocks after the skipped ones")

    @property
    def as_published(self) -> bool:
        """Whether pruning stays at attention, as the paper's."""
        return self.scope == "attn"

    def choices(self, steps: int) -> tuple[StepChoice, ...]:
        """What is done with each step of a run, by the schedule or the interval, within the mode.

        Raises:
            DiffratioError: the schedule cannot be carried over to so many steps.
        """
        return _choices(self, steps)

    def removed(self, grid: TokenGrid, steps: int) -> tuple[int, ...]:
        """Pruned tokens r of each step.

        Raises:
            DiffratioError: the grid holds no whole cell.
        """
        return _removed(self, grid, steps)

    def skipped(self, description: Description) -> tuple[int, int]:
        """First and last block that cached steps skip.

        Raises:
            DiffratioError: there is none.
        """
        first, last = self.first_blocks, description.layers - 1 - self.last_blocks
        if last < first:
            raise DiffratioError(
                f"dato: first_blocks {first} and last_blocks {self.last_blocks} leave none of {description.layers} "
                "blocks to skip; lower one of them, or take action R or mode=prune"
            )
        return first, last


@functools.lru_cache(maxsize=64)
def _choices(config: DaTo, steps: int) -> tuple[StepChoice, ...]:
    if config.schedule is None:
        every = 1.0 if config.mode == "prune" else config.every
        own = StepChoice(COMPUTE, config.ratio), StepChoice(config.action)
        found = tuple(own[0] if computed(step, every) else own[1] for step in range(steps))
    else:
        found = config.schedule.over(steps)
    if config.mode == "cache":
        return tuple(StepChoice(one.action) for one in found)
    if config.mode == "prune":
        return tuple(one if one.action == COMPUTE else StepChoice() for one in found)
    return found


@functools.lru_cache(maxsize=64)
def _removed(config: DaTo, grid: TokenGrid, steps: int) -> tuple[int, ...]:
    counts, turn = [], 0
    choices = config.choices(steps)
    most = grid.tokens - check_cells("dato", grid, CELL) if any(one.ratio for one in choices) else 0
    for step, one in enumerate(choices):
        amount = min(most, whole(one.ratio * grid.tokens, turn, config.mix))
        counts.append(0 if step == 0 and config.fill == "cached" else amount)
        turn += one.action == COMPUTE
    return tuple(counts)
