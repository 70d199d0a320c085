"""Runs a search: evaluations that are kept at once, the front, and how it stands against uniform schedules."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from diffratio.errors import DiffratioError, Terminated
from diffratio.files import writable_folder
from diffratio.methods.dato import DaTo
from diffratio.methods.fewer_steps import FewerSteps
from diffratio.methods.step_front import FRONT_FILE, FrontEntry, StepFront
from diffratio.sampling.schedulers import sampler_of
from diffratio.search.folder import SearchFolder
from diffratio.search.judge import Judge, load_judge
from diffratio.search.outcome import Measured, baselines, in_words, parts, picture, rows, write_front
from diffratio.search.settings import SearchSettings
from diffratio.search.space import Codes, Space, spelled

HELD_OUT = "held out: "


def search(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Runs a search, or what is missing of it.

    Args:
        cfg: composed `search` config as plain data.

    Returns:
        Paths, the front and the comparison with uniform schedules; and the same for reading.

    Raises:
        DiffratioError: bad settings, pymoo is missing, or a folder that holds another search.
        Terminated: SIGTERM; every evaluation so far is kept.
    """
    settings = SearchSettings.from_config(cfg)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DiffratioError("search runs in one process: start it without accelerate launch or torchrun")
    evolve = _nsga()
    space = Space(settings.steps, settings.allowed_actions, settings.allowed_ratios)
    judge = load_judge(settings)
    folder = SearchFolder(settings.out, definition(settings, judge))
    writable_folder(folder.path)
    one = _Search(settings, space, judge, folder)
    try:
        return one.run(evolve)
    except Terminated:
        raise Terminated(f"terminated: {len(folder.known)} evaluations are kept; the same command goes on") from None


def definition(settings: SearchSettings, judge: Judge) -> dict[str, Any]:
    """Everything that an evaluation depends on, and what the search replays from; not the number of generations."""
    sampler, options = sampler_of(judge.pipe.scheduler)
    asked = getattr(judge.pipe, "prompts", None) or getattr(judge.pipe, "asked", None) or ()
    return {
        "weights": settings.weights,
        "weights_sha256": judge.digest,
        "method": settings.method,
        "run": judge.run.to_json(),
        "guidance_scale": float(settings.guidance_scale),
        "sampler": [sampler, {key: str(value) for key, value in options.items()}],
        "prompts": [str(one) for one in asked],
        "error": settings.error,
        "n": settings.n,
        "held_out_n": settings.held_out_n,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "population": settings.population,
        "actions": list(settings.allowed_actions),
        "ratios": list(settings.allowed_ratios),
    }


def _nsga() -> Callable[..., None]:
    try:
        from diffratio.search.nsga import evolve
    except ImportError as error:
        if (error.name or "").split(".")[0] == "diffratio":
            raise
        raise DiffratioError(
            f"search needs pymoo, which is not installed ({error}): pip install -c constraints.txt diffratio[search]"
        ) from None
    return evolve


class _Search:
    def __init__(self, settings: SearchSettings, space: Space, judge: Judge, folder: SearchFolder) -> None:
        self.settings, self.space, self.judge, self.folder = settings, space, judge, folder
        self.asked: dict[Codes, tuple[float, float]] = {}
        self.spent, self.measured = 0.0, 0  # seconds, and evaluations of this start
        self.held_out_ahead = 0

    def run(self, evolve: Callable[..., None]) -> tuple[dict[str, Any], str]:
        """All generations, then what was found on held-out noise."""
        own = self.settings
        if self.folder.before:
            self.say(f"{self.folder.before} evaluations stand already; they are not repeated")
        if self.folder.timetables is None:  # kept with the folder: a rerun starts from the same ones anywhere
            self.folder.timetables = self.judge.timetables()
        first = self.space.population(own.population, own.seed, self.folder.timetables)
        others = baselines(own)
        self.held_out_ahead = len(others) + own.population  # about as many as the front will have
        evolve(self.space, first, own.population, own.generations, own.seed, self._objectives, self._after)
        found = [
            FrontEntry(self.judge.schedule(self.space.choices(codes)), fraction, error)
            for codes, (error, fraction) in self.front()
        ]
        self.say(f"{len(self.asked)} schedules, {len(found)} on the front; now on {own.held_out_n} held-out samples")
        entries = tuple(
            FrontEntry(one.schedule, one.fraction, one.error, self._held_out(DaTo(schedule=one.schedule)))
            for one in found
        )
        uniform = [Measured(name, self.judge.fraction(config), self._held_out(config)) for name, config in others]
        front = StepFront(entries)
        compared = rows(front, uniform)
        split = parts(front, self.judge, self._held_out)
        writable_folder(self.folder.path)
        place = self.folder.path / FRONT_FILE
        write_front(place, front, self.folder.definition, compared, uniform, split)
        drawn = picture(self.folder.path / "front.svg", front, uniform, own.error)
        document = {
            "front": str(place),
            "picture": str(drawn) if drawn else None,
            "evaluated": len(self.asked),
            "known_before": self.folder.before,
            "entries": [
                {"fraction": one.fraction, "error": one.error, "held_out_error": one.held_out_error} for one in entries
            ],
            "against_uniform": compared,
            "parts": split,
        }
        return document, in_words(document, len(front.entries))

    def front(self) -> list[tuple[Codes, tuple[float, float]]]:
        """Of all that was evaluated, what nothing cheaper beats; by rising cost."""
        found: list[tuple[Codes, tuple[float, float]]] = []
        for codes, pair in sorted(self.asked.items(), key=lambda item: (item[1][1], item[1][0], item[0])):
            if not found or pair[0] < found[-1][1][0]:
                found.append((codes, pair))
        return found

    def _objectives(self, codes: Codes) -> tuple[float, float]:
        if codes not in self.asked:
            schedule = self.judge.schedule(self.space.choices(codes))
            config = DaTo(schedule=schedule)
            error = self._known(spelled(schedule.choices), lambda: self.judge.error(config))
            self.asked[codes] = error, self.judge.fraction(config)
        return self.asked[codes]

    def _held_out(self, config: DaTo | FewerSteps) -> float:
        self.held_out_ahead = max(0, self.held_out_ahead - 1)
        if isinstance(config, DaTo):
            name = spelled(config.choices(self.settings.steps))
        else:
            name = f"{config.steps(self.settings.steps)} steps"
        return self._known(HELD_OUT + name, lambda: self.judge.error(config, held_out=True))

    def _known(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.folder.known:
            self.judge.dense(key.startswith(HELD_OUT))  # once, and not part of the time of an evaluation
            started = time.perf_counter()
            self.folder.add(key, measure())
            self.spent, self.measured = self.spent + time.perf_counter() - started, self.measured + 1
        return self.folder.known[key]

    def _after(self, generation: int) -> None:
        own = self.settings
        held_out = self.held_out_ahead * own.held_out_n / own.n
        ahead = (own.generations - generation) * own.population + held_out
        left = f", about {ahead * self.spent / self.measured:.0f} s left" if self.measured else ""
        half = [error for error, fraction in self.asked.values() if fraction <= 0.5]
        best = f", error {min(half):.3g} within half of the MACs" if half else ""
        self.say(f"generation {generation} of {own.generations}: {len(self.asked)} schedules{best}{left}")

    def say(self, line: str) -> None:
        """A line on standard error."""
        print(line, file=sys.stderr, flush=True)
