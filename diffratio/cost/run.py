"""What is sampled: the run that costs and budgets refer to, and where in it a forward stands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from diffratio.errors import DiffratioError, shortened
from diffratio.tokens.grid import TokenGrid

MOST_STEPS = 1 << 16  # of a run; samplers know a thousand
_MOST = 1 << 20  # text tokens of a sample, and samples of a batch
Guidance = Literal["none", "cfg"]
# what one forward's batch holds: both guidance halves in some order, one half alone, or no guidance (`one`)
Halves = Literal["one", "cond_first", "uncond_first", "cond", "uncond"]


@dataclass(frozen=True)
class SamplingRun:
    """One sampling run, as costs see it.

    Args:
        noise_levels: noise level u in [0, 1] of every evaluated step, in the order of evaluation (noisiest first).
        grid: token grid of one sample.
        guidance: `cfg` evaluates the conditional and the unconditional half, `none` only one.
        text_tokens: text tokens of one sample (0 for class-conditional models).
        batch: samples generated together (costs are per sample; latency is not).
        guided: by step, whether the unconditional half is evaluated too; None is in every step, as `guidance` says.
    """

    noise_levels: tuple[float, ...]
    grid: TokenGrid
    guidance: Guidance = "cfg"
    text_tokens: int = 0
    batch: int = 1
    guided: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_levels", tuple(float(u) for u in self.noise_levels))
        if not self.noise_levels:
            raise DiffratioError("a sampling run needs at least one step")
        if self.steps > MOST_STEPS:
            raise DiffratioError(f"a sampling run has at most {MOST_STEPS:,} steps, got {self.steps:,}")
        if any(not 0.0 <= u <= 1.0 for u in self.noise_levels):
            raise DiffratioError(f"noise levels must lie in [0, 1], got {shortened(self.noise_levels)}")
        if not isinstance(self.guidance, str) or self.guidance not in ("none", "cfg"):
            raise DiffratioError(f"guidance must be 'none' or 'cfg', got {shortened(self.guidance)}")
        if type(self.text_tokens) is not int or not 0 <= self.text_tokens <= _MOST:
            raise DiffratioError(
                f"text tokens of a run must be an integer of 0 to {_MOST}, got {shortened(self.text_tokens)}"
            )
        if type(self.batch) is not int or not 1 <= self.batch <= _MOST:
            raise DiffratioError(f"batch of a run must be an integer of 1 to {_MOST}, got {shortened(self.batch)}")
        if self.guided is not None:
            self._check_guided()

    def _check_guided(self) -> None:
        guided = self.guided
        if not isinstance(guided, list | tuple) or any(type(one) is not bool for one in guided):
            raise DiffratioError(f"guided steps of a run are a list of true and false, got {shortened(guided)}")
        if len(guided) != self.steps:
            raise DiffratioError(
                f"guided says it of {len(guided)} steps and the run has {self.steps}: give one for each"
            )
        if self.guidance == "none":
            raise DiffratioError("a run with guidance 'none' has no guided steps to choose: leave guided out")
        object.__setattr__(self, "guided", None if all(guided) else tuple(guided))  # equal runs compare equal

    @property
    def steps(self) -> int:
        """Number of evaluated steps."""
        return len(self.noise_levels)

    @property
    def halves(self) -> int:
        """Forwards per guided step and sample."""
        return 2 if self.guidance == "cfg" else 1

    def halves_at(self, step: int) -> int:
        """Forwards of one step per sample: one where the unconditional half is left out."""
        return self.halves if self.guided is None or self.guided[step] else 1

    @property
    def forwards(self) -> int:
        """Forwards of the whole run per sample."""
        return sum(self.halves_at(step) for step in range(self.steps))

    def with_guided(self, guided: tuple[bool, ...] | None) -> SamplingRun:
        """The run with other guided steps."""
        return self if guided == self.guided else replace(self, guided=guided)

    def region_counts(self, regions: int) -> tuple[int, ...]:
        """How many steps fall into each of R regions, cleanest first."""
        counts = [0] * regions
        for u in self.noise_levels:
            counts[region_of(u, regions)] += 1
        return tuple(counts)

    def region_forwards(self, regions: int) -> tuple[int, ...]:
        """How many forwards a sample has in each of R regions, both guidance halves, cleanest first."""
        counts = [0] * regions
        for step, u in enumerate(self.noise_levels):
            counts[region_of(u, regions)] += self.halves_at(step)
        return tuple(counts)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        document: dict[str, Any] = {
            "noise_levels": list(self.noise_levels),
            "grid": [self.grid.height, self.grid.width],
            "guidance": self.guidance,
            "text_tokens": self.text_tokens,
            "batch": self.batch,
        }
        if self.guided is not None:
            document["guided"] = list(self.guided)
        return document

    @classmethod
    def from_json(cls, document: Any) -> SamplingRun:
        """Raises DiffratioError where the document is not a run."""
        try:
            height, width = document["grid"]
            return cls(
                noise_levels=tuple(float(u) for u in document["noise_levels"]),
                grid=TokenGrid(height, width),
                guidance=document["guidance"],
                text_tokens=document["text_tokens"],
                batch=document["batch"],
                guided=document.get("guided"),
            )
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, DiffratioError):
                raise
            raise DiffratioError(f"not a sampling run: {type(error).__name__} {error}") from None


def region_of(noise_level: float, regions: int) -> int:
    """Region of a noise level u: min(R - 1, floor(R u)); region 0 is the cleanest. Nudged by 1e-6 / R (float noise)."""
    return min(regions - 1, int(regions * noise_level + 1e-6))


def regions_of(noise_levels: Tensor, regions: int) -> Tensor:
    """`region_of` for a tensor of noise levels (B,) -> (B,) int64."""
    return (noise_levels.double() * regions + 1e-6).floor().long().clamp_(0, regions - 1)


def uniform_run(steps: int, grid: TokenGrid, guidance: Guidance = "cfg", text_tokens: int = 0) -> SamplingRun:
    """The run of uniformly spaced levels 1, 1 - 1/S, ..., 1/S (flow-matching Euler with shift 1)."""
    if not 1 <= steps <= MOST_STEPS:
        raise DiffratioError(f"steps must be at least 1 and at most {MOST_STEPS:,}, got {steps}")
    return SamplingRun(tuple((steps - i) / steps for i in range(steps)), grid, guidance, text_tokens)


@dataclass(frozen=True)
class StepContext:
    """Where one transformer forward stands.

    Args:
        step: index of the sampling step, or None outside an open run.
        noise_level: its noise level as a Python number, or None while training.
        noise_levels: per-sample noise levels (B,) while training, or outside an open run.
        run: the open run, or None.
        grid: token grid of this forward.
        halves: which guidance halves the blocks' batch holds: `cond_first` or `uncond_first` (both), `cond` or `uncond`
            (one of them; also the conditional half of a step without guidance), or `one` (no guidance, or not said).
        training: whether the transformer is in training mode.
        seed: seed of the run; a method's draws depend on (seed, step, sample) alone.
    """

    step: int | None
    noise_level: float | None
    noise_levels: Tensor | None
    run: SamplingRun | None
    grid: TokenGrid
    halves: Halves = "one"
    training: bool = False
    seed: int = field(default=0)

    @property
    def paired(self) -> bool:
        """Whether the batch holds both guidance halves."""
        return self.halves in ("cond_first", "uncond_first")
