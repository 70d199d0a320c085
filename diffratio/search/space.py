"""The genome: one whole number a step, which stands for an action and a ratio."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from diffratio.methods.intervals import computed
from diffratio.methods.step_schedule import COMPUTE, EXTRAPOLATE, SKIP, StepChoice

Codes = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """All schedules that a search may find.

    Args:
        steps: S.
        actions: that a step may take.
        ratios: pruned fractions of a computed step, beside 0.
    """

    steps: int
    actions: tuple[str, ...]
    ratios: tuple[float, ...] = ()

    @property
    def alphabet(self) -> tuple[StepChoice, ...]:
        """What the numbers stand for; 0 is computing in full."""
        cached = tuple(StepChoice(action) for action in self.actions if action != COMPUTE)
        return (StepChoice(), *(StepChoice(COMPUTE, ratio) for ratio in self.ratios), *cached)

    def repaired(self, codes: Sequence[int]) -> Codes:
        """The nearest schedule that can be carried out, in one spelling.

        Step 0 is computed; until two steps were computed there is nothing to extrapolate from, and E is S.
        """
        alphabet, found, full = self.alphabet, list(map(int, codes)), 0
        if alphabet[found[0]].action != COMPUTE:
            found[0] = 0
        for step, code in enumerate(found):
            if alphabet[code].action == EXTRAPOLATE and full < 2 and SKIP in self.actions:
                found[step] = alphabet.index(StepChoice(SKIP))
            full += alphabet[code].action == COMPUTE
        return tuple(found)

    def choices(self, codes: Codes) -> tuple[StepChoice, ...]:
        """What is done with each step."""
        return tuple(self.alphabet[code] for code in codes)

    def seeds(self) -> list[Codes]:
        """Schedules that people use: uniform intervals, front-loaded lists, one ratio everywhere, and the dense run."""
        cached = [code for code, one in enumerate(self.alphabet) if one.action != COMPUTE]
        counts = [max(1, round(self.steps * share)) for share in (0.5, 0.33, 0.75, 0.25, 0.2, 0.9, 0.1)]
        found = [(0,) * self.steps]
        for count in counts:
            for code in cached:
                even = [0 if computed(step, self.steps / count) else code for step in range(self.steps)]
                # computed steps at the squares: half of them in the first quarter of the run
                early = {int(self.steps * (index / count) ** 2) for index in range(count)}
                front = [0 if step in early else code for step in range(self.steps)]
                found += [self.repaired(even), self.repaired(front)]
        found += [(1 + at,) * self.steps for at in range(len(self.ratios))]
        return list(dict.fromkeys(found))

    def population(self, size: int, seed: int) -> list[Codes]:
        """The first population: seeds, of which at most three quarters, and draws of every density."""
        draws = random.Random(seed)
        found = self.seeds()[: max(1, 3 * size // 4)]
        computing = [code for code, one in enumerate(self.alphabet) if one.action == COMPUTE]
        others = [code for code in range(len(self.alphabet)) if code not in computing] or computing
        for _ in range(100 * size):  # of a small space there may be no more
            if len(found) >= size:
                break
            share = draws.random()
            codes = [draws.choice(computing if draws.random() < share else others) for _ in range(self.steps)]
            if (one := self.repaired(codes)) not in found:
                found.append(one)
        return found


def spelled(choices: Sequence[StepChoice]) -> str:
    """A schedule in one line: `C C0.5 S R`."""
    return " ".join(one.action + (f"{one.ratio:g}" if one.ratio else "") for one in choices)
