"""`block_cache`: between computed steps the residual of a range of blocks is added instead of running them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.methods.actions import Reuse, Skip, StepAction
from diffratio.methods.base import Method, MethodConfig, check_budget, register
from diffratio.methods.intervals import computed, inner_blocks
from diffratio.methods.merging import Ladder, check_count, dearest_on_ladders, whole
from diffratio.methods.step_schedule import COMPUTE, CONTINUE, EXTRAPOLATE, REUSING, SKIP, check_actions


@dataclass(frozen=True)
class BlockCache(MethodConfig):
    """Every n-th step is computed in full; the others skip a range of blocks and add its stored residual.

    Args:
        every: n, from 1; higher computes fewer steps, 1 computes all. Between two whole numbers both intervals occur.
        first: the first block of the range: an index (integer), or a fraction of the blocks before it (float in
            [0, 1]); None leaves the first block out.
        last: the last block of the range: an index (integer), or the fraction of the blocks that end with it (float in
            [0, 1]); None leaves the last block out.
        extrapolate: whether the residual is carried on linearly, by noise level, from those of the last two full steps.
        window: noise levels (low, high), both included, outside of which every step is full; None is [0, 1].
        full_steps: further steps that are full, by index from 0. Step 0 always is.
        actions: one letter a step instead of `every`: C computes, S skips the range, E skips it and extrapolates, R
            reuses the last output, X extrapolates the last two; step 0 is C. A tuple, or one string.
        mix: steps take turns between the two whole numbers of blocks next to a fractional `last`, so that budgets are
            met finely; otherwise it is rounded.

    Source: the uniform intervals of Delta-DiT (arXiv 2406.01125) and FORA (arXiv 2407.01425).
    """

    every: float = 2.0
    first: int | float | None = None
    last: int | float | None = None
    extrapolate: bool = False
    window: tuple[float, float] | None = None
    full_steps: tuple[int, ...] = ()
    actions: tuple[str, ...] | None = None
    mix: bool = False

    def __post_init__(self) -> None:
        check_every("block_cache", self.every)
        for name in ("first", "last"):
            value = getattr(self, name)
            index = type(value) is int and value >= 0
            if value is not None and not index and not (isinstance(value, float) and 0 <= value <= 1):
                raise DiffratioError(
                    f"block_cache: {name} {value!r} is neither a block (integer from 0) nor a fraction of the blocks "
                    "(float in [0, 1])"
                )
        window = self.window
        if window is not None and not (isinstance(window, tuple) and len(window) == 2 and _rises(window)):
            raise DiffratioError(f"block_cache: window {window!r} must be two noise levels, 0 <= low <= high <= 1")
        for step in self.full_steps:
            check_count("block_cache", "full_steps", step, 0, "index of a step")
        if self.actions is None:
            return
        object.__setattr__(self, "actions", tuple(self.actions))
        check_actions(self.actions, "block_cache actions")
        if self.window is not None or self.full_steps or self.extrapolate:
            raise DiffratioError(
                "block_cache: actions says what every step does; leave window, full_steps and extrapolate out"
            )

    def letters(self, noise_levels: Sequence[float]) -> tuple[str, ...]:
        """What is done with each step of a run.

        Raises:
            DiffratioError: `actions` or `full_steps` do not fit its number of steps.
        """
        steps = len(noise_levels)
        if self.actions is not None:
            if len(self.actions) != steps:
                raise DiffratioError(
                    f"block_cache: {len(self.actions)} actions and the run has {steps} steps; give one for each"
                )
            return self.actions
        if self.full_steps and max(self.full_steps) >= steps:
            raise DiffratioError(
                f"block_cache: full_steps {max(self.full_steps)} is none of the run's steps 0..{steps - 1}"
            )
        low, high = self.window or (0.0, 1.0)
        between = EXTRAPOLATE if self.extrapolate else SKIP
        return tuple(
            COMPUTE
            if computed(step, self.every) or step in self.full_steps or not low - 1e-6 <= u <= high + 1e-6
            else between
            for step, u in enumerate(noise_levels)
        )


def check_every(method: str, every: object) -> None:
    """Raises DiffratioError for what is no interval between computed steps."""
    if not isinstance(every, int | float) or isinstance(every, bool) or not 1 <= every < float("inf"):
        raise DiffratioError(
            f"{method}: every {every!r} must be a number of at least 1: each n-th step is computed, 1 computes all"
        )


def _rises(window: tuple[float, ...]) -> bool:
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in window)
    return numbers and 0 <= window[0] <= window[1] <= 1


@register
class BlockCacheMethod(Method):
    """Says which steps skip; surgery keeps the residuals, in all streams and for both guidance halves."""

    name = "block_cache"
    config_class = BlockCache
    stateful = True
    token_level = False

    def __init__(self, config: BlockCache, description: Description) -> None:
        super().__init__(config, description)
        _range(config, description.layers)  # whether it fits the model

    def check_beside(self, others: Sequence[Method]) -> None:
        """Another method that caches, or one that must see every step under a reuse, is refused."""
        for other in others:
            if other.decides_steps:
                raise DiffratioError(
                    f"block_cache and {other.name} both decide which steps are computed; take one of them"
                    + (", or dato with mode=prune" if other.name == "dato" else "")
                )
            if set(REUSING) & set(self.config.actions or ()) and other.stateful and other.token_level:
                raise DiffratioError(
                    f"block_cache reuses outputs (actions R and X) and {other.name} must see every step; take S or E, "
                    "or another token-level method"
                )

    def action(self, step: int, run: SamplingRun) -> StepAction | None:
        """From the interval, or the given letters."""
        return _actions(self.config, self.description.layers, run.noise_levels)[step]

    @classmethod
    def for_budget(cls, description: Description, run: SamplingRun, budget: float) -> BlockCache:
        """As many computed steps as the whole range allows, then a range that is only as long as it must be.

        The range ends earlier in some steps than in others; below what all but the first and last block reach, it takes
        in all blocks. One block in one step is the finest.
        """
        if check_budget(budget) == 1:
            return BlockCache(every=1.0)
        hint = f"the finest step is one block in one of {run.steps} steps; a run of more steps is finer"
        config = dearest_on_ladders(cls, _ladders(description, run), description, run, budget, hint)
        assert isinstance(config, BlockCache)
        return config


@functools.lru_cache(maxsize=256)
def _actions(config: BlockCache, layers: int, noise_levels: tuple[float, ...]) -> tuple[StepAction | None, ...]:
    first, amount = _range(config, layers)
    found: list[StepAction | None] = []
    turn = 0
    for letter in config.letters(noise_levels):
        if letter == COMPUTE:
            found.append(None)
        elif letter in REUSING:
            found.append(Reuse(letter == CONTINUE))
        else:
            last = whole(amount, turn, config.mix) - 1
            found.append(Skip(first, last, letter == EXTRAPOLATE) if last >= first else None)
            turn += 1
    return tuple(found)


def _range(config: BlockCache, layers: int) -> tuple[int, float]:
    """First block of the range and number of blocks that end with its last one, fractional where steps mix.

    Raises:
        DiffratioError: it does not fit a model of so many blocks.
    """
    own = inner_blocks(layers)
    first = own[0] if config.first is None else config.first
    last = own[1] if config.last is None else config.last
    start = first if isinstance(first, int) else round(first * layers)
    end = last + 1.0 if isinstance(last, int) else last * layers
    end = end if config.mix else float(round(end))
    if not start < end <= layers:
        raise DiffratioError(
            f"block_cache: first {config.first!r} and last {config.last!r} leave no range in a model of {layers} "
            f"blocks; as indexes they are 0 <= first <= last <= {layers - 1}"
        )
    return start, end


def _ladders(description: Description, run: SamplingRun) -> Iterator[Sequence[BlockCache]]:
    layers, steps = description.layers, run.steps
    inner = inner_blocks(layers)

    def ladder(count: int, first: int, last: int) -> Ladder[BlockCache]:
        """Of `count` computed steps; the others skip one block more from rung to rung, together."""
        skipping = steps - count

        def config(at: int) -> BlockCache:
            end = (first + (at + 1) / skipping) / layers
            return BlockCache(every=steps / count, first=first, last=min(1.0, end), mix=True)

        return Ladder((last - first + 1) * skipping, config)

    for first, last in dict.fromkeys((inner, (0, layers - 1))):
        for count in range(steps - 1, 0, -1):
            yield ladder(count, first, last)
