"""Published lists of computed steps, read as step schedules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffratio.cost.macs import Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError, shortened
from diffratio.files import parse_json, read_text
from diffratio.methods.step_schedule import COMPUTE, REUSE, StepSchedule

_LARGEST = 1 << 20  # bytes of a file
TIMESTEPS = 1000  # that published lists of timesteps count
FORMS = (
    "0 and 1 for every step (1 is computed), rising numbers of the computed steps from 0, or falling timesteps below "
    f"{TIMESTEPS}"
)


def from_mask(
    numbers: Sequence[int], description: Description, run: SamplingRun, cached: str = REUSE, where: str = "step mask"
) -> StepSchedule:
    """A step schedule of a published list.

    Args:
        numbers: 0 and 1 for every step (1 is computed); or the numbers of the computed steps from 0, rising; or their
            timesteps t of 1000, falling, where each means the step of the run whose noise level is nearest to t / 1000.
        description: the model that it is for.
        run: whose steps these are; a list of 0 and 1 may have another length, and is then carried over as any
            schedule is.
        cached: action of the other steps: `R` reuses the last output, which is what dropping a step does; `S` or `E`.
        where: what messages call the list.

    Raises:
        DiffratioError: none of these, or its first step is not computed.

    Example:
        >>> from diffratio.cost.macs import BlockCost
        >>> from diffratio.cost.run import uniform_run
        >>> from diffratio.tokens import TokenGrid
        >>> model = Description("dit", 16, (BlockCost(()),) * 3, per_token=0, fixed=0)
        >>> lists = ([1, 0, 1, 0], [0, 2], [999, 520])
        >>> found = [from_mask(one, model, uniform_run(4, TokenGrid(4, 4))).choices for one in lists]
        >>> ["".join(choice.action for choice in choices) for choices in found]
        ['CRCR', 'CRCR', 'CRCR']
    """
    given = list(numbers)
    if not given or any(type(one) is not int or one < 0 for one in given):
        raise DiffratioError(f"{where}: it takes {FORMS}; got {shortened(given)}")
    rises = all(a < b for a, b in zip(given, given[1:], strict=False))
    falls = all(a > b for a, b in zip(given, given[1:], strict=False))
    levels = run.noise_levels
    if set(given) <= {0, 1} and (len(given) == run.steps or not rises):
        levels = levels if len(given) == run.steps else _levels(levels, len(given))
        kept = {step for step, one in enumerate(given) if one}
    elif rises and given[-1] < run.steps:
        kept = set(given)
    elif falls and given[0] < TIMESTEPS:
        kept = {min(range(run.steps), key=lambda step: abs(levels[step] - t / TIMESTEPS)) for t in given}
    else:
        raise DiffratioError(f"{where}: it takes {FORMS}; the run has {run.steps} steps, got {shortened(given)}")
    actions = [COMPUTE if step in kept else cached for step in range(len(levels))]
    if actions[0] != COMPUTE:
        raise DiffratioError(f"{where}: its first step is not computed, and nothing is stored before it")
    model = description.family, description.layers, description.width
    return StepSchedule.of(actions, levels, *model)


def read_mask(path: str | Path, description: Description, run: SamplingRun) -> StepSchedule:
    """`from_mask` of a JSON list or of a text file with numbers between spaces, commas or lines.

    Raises:
        DiffratioError: no such file, or not such a list.
    """
    where = f"step mask {shortened(str(path))}"
    text = read_text(path, where, _LARGEST)
    try:
        numbers = parse_json(text)
    except ValueError:
        words = re.split(r"[\s,;]+", text.strip().strip("[]"))
        if not all(word.isdecimal() and len(word) < 10 for word in words):
            raise DiffratioError(f"{where}: it takes {FORMS}; got {shortened(text.strip())}") from None
        numbers = [int(word) for word in words]
    if not isinstance(numbers, list):
        numbers = [numbers]
    return from_mask([int(one) if isinstance(one, bool) else one for one in numbers], description, run, where=where)


def is_mask(path: str | Path) -> bool:
    """Whether a file is a plain list: text, or JSON that does not begin with an object."""
    place = Path(path)
    if not place.is_file():
        return False
    with place.open("rb") as handle:
        return not handle.read(64).lstrip().startswith(b"{")


def _levels(levels: Sequence[float], steps: int) -> tuple[float, ...]:
    """The same curve of noise levels, read at another number of steps."""
    ends = (*levels, 0.0)
    found = []
    for step in range(steps):
        place = step * len(levels) / steps
        low = min(int(place), len(levels) - 1)
        found.append(ends[low] + (place - low) * (ends[low + 1] - ends[low]))
    return tuple(found)
