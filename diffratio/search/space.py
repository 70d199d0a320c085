"""The genome: one whole number a step, which stands for an action and a ratio."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from diffratio.methods.intervals import computed
from diffratio.methods.step_schedule import COMPUTE, EXTRAPOLATING, StepChoice

Codes = tuple[int, ...]
Timetables = Mapping[str, Sequence[Sequence[int]]]


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

        Step 0 is computed; until two steps were computed there is nothing to extrapolate from: E is S, and X is R.
        """
        alphabet, found, full = self.alphabet, list(map(int, codes)), 0
        if alphabet[found[0]].action != COMPUTE:
            found[0] = 0
        for step, code in enumerate(found):
            action = alphabet[code].action
            if full < 2 and EXTRAPOLATING.get(action) in self.actions:
                found[step] = alphabet.index(StepChoice(EXTRAPOLATING[action]))
            full += action == COMPUTE
        return tuple(found)

    def choices(self, codes: Codes) -> tuple[StepChoice, ...]:
        """What is done with each step."""
        return tuple(self.alphabet[code] for code in codes)

    def seeds(self, timetables: Timetables | None = None) -> list[Codes]:
        """Where a search starts: the dense run, given timetables with each action, and schedules that people use.

        Args:
            timetables: computed steps of each, the most wanted first, for outputs that are `reused` or `extrapolated`.

        Returns:
            Repaired, each once; after the timetables uniform intervals, front-loaded lists and one ratio everywhere.
        """
        # reuse costs nothing, so it goes first
        cached = [code for code, one in enumerate(self.alphabet) if one.action != COMPUTE][::-1]
        found = [(0,) * self.steps]
        uniform: list[Codes] = []
        for code in cached:
            kind = "extrapolated" if self.alphabet[code].action in EXTRAPOLATING else "reused"
            found += [self._computing(table, code) for table in (timetables or {}).get(kind, ())]
        for share in (0.5, 0.33, 0.75, 0.25, 0.2, 0.9, 0.1):
            count = max(1, round(self.steps * share))
            even = [step for step in range(self.steps) if computed(step, self.steps / count)]
            # computed steps at the squares: half of them in the first quarter of the run
            early = {int(self.steps * (index / count) ** 2) for index in range(count)}
            uniform += [self._computing(steps, code) for code in cached[::-1] for steps in (even, early)]
        # in turn, so that a small population has some of each
        apart = zip_longest(found[1:], uniform) if timetables else [(one,) for one in uniform]
        found += [one for pair in apart for one in pair if one is not None]
        found += [(1 + at,) * self.steps for at in range(len(self.ratios))]
        return list(dict.fromkeys(found))

    def _computing(self, steps: Collection[int], code: int) -> Codes:
        return self.repaired([0 if step in steps else code for step in range(self.steps)])

    def population(self, size: int, seed: int, timetables: Timetables | None = None) -> list[Codes]:
        """The first population: seeds, of which at most three quarters, and draws of every density."""
        draws = random.Random(seed)
        found = self.seeds(timetables)[: max(1, 3 * size // 4)]
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
