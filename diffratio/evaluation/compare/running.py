"""Runs a comparison: plan, then cell by cell, then the report; a rerun does only what is missing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.conditions import Captions, Conditions
from diffratio.errors import DiffratioError, ReportedElsewhere
from diffratio.evaluation.compare.arms import Contender, Lineup, line_up
from diffratio.evaluation.compare.folder import ComparisonFolder
from diffratio.evaluation.compare.holes import give_holes_, shown_to, true_pictures
from diffratio.evaluation.compare.measuring import MISSES, HeldOut, Referee, failed, row_of
from diffratio.evaluation.compare.plan import make_plan, plan_text, remaining
from diffratio.evaluation.compare.settings import CompareSettings, TrainedArm
from diffratio.evaluation.compare.tracking import check_logger, track
from diffratio.evaluation.features import Lite0Features
from diffratio.evaluation.records import Record
from diffratio.evaluation.reference import content_hash
from diffratio.evaluation.report import write_report
from diffratio.sampling.generate import generate, initial_noise
from diffratio.sampling.processes import Team
from diffratio.sampling.schedulers import sampler_of
from diffratio.sampling.text import PixelTextPipeline

Cell = tuple[int, Contender]


@dataclass(frozen=True)
class Latents:
    """What a comparison of models in latent space needs beside pictures.

    Args:
        held_out: n -> held-out latents (n, C, h, w) as the transformer takes them, and labels (n,).
        check: (pipeline, its name) -> nothing; raises DiffratioError where its VAE or text encoder is another one.
    """

    held_out: HeldOut
    check: Callable[[Any, str], None]

    def check_all(self, lineup: Lineup) -> None:
        """Checks every arm."""
        for one in lineup.contenders:
            if one.pipe is not None:
                self.check(one.pipe, one.arm.weights)


def compare_from_config(
    cfg: Mapping[str, Any],
    held_out: HeldOut,
    trained: Sequence[TrainedArm] = (),
    train: HeldOut | None = None,
    conditions: Conditions | None = None,
    latents: Latents | None = None,
) -> dict[str, Any]:
    """Runs a comparison, or what is missing of it.

    In several processes (accelerate, torchrun) every process must call it: they share the sampling, the first one
    measures, times and writes.

    Args:
        cfg: composed `compare` config as plain data.
        held_out: n -> held-out images (n, C, H, W) in [-1, 1] and labels (n,).
        trained: arms that were fine-tuned for this comparison; those without a folder are planned only.
        train: the same for training images, which the nearest-image distance needs; None leaves it out.
        conditions: what labels stand for; None takes them for classes. Captions of held-out images are the prompts.
        latents: of models in latent space, what losses are taken on; the images above are decoded ones then.

    Returns:
        Paths of the report and a row of key figures for each record; with `dry_run` the plan. Empty in all processes
        but the first.

    Raises:
        DiffratioError: bad settings, or an output folder that holds another comparison.
    """
    settings = CompareSettings.from_config(cfg)
    check_logger(cfg.get("logger"))
    pending = [one for one in trained if one.folder is None]
    if pending and not settings.dry_run:
        raise DiffratioError(f"arm {pending[0].name!r} at {pending[0].budget:g} has no checkpoint; train it first")
    team = Team()
    device = team.device(settings.device)
    lineup = team.together(lambda: line_up(settings, device, trained))
    if latents is not None:
        team.together(lambda: latents.check_all(lineup))
    if isinstance(conditions, Captions):
        _ask(lineup, conditions, held_out(settings.reference_n)[1])
    give_holes_(lineup, true_pictures(settings, held_out, int((cfg.get("data") or {}).get("seed") or 0)))
    folder = Path(cfg["paths"]["output_dir"])
    comparison = _Comparison(settings, lineup, folder, held_out, train, team, device, conditions, latents)
    plan = team.on_main(lambda: comparison.open(cfg, pending))
    if settings.dry_run:
        return plan if team.is_main else {}
    comparison.run()
    answer = team.on_main(lambda: comparison.finish(cfg.get("logger")))
    return answer if team.is_main else {}


class _Comparison:
    def __init__(
        self,
        settings: CompareSettings,
        lineup: Lineup,
        path: Path,
        held_out: HeldOut,
        train: HeldOut | None,
        team: Team,
        device: str,
        conditions: Conditions | None,
        latents: Latents | None,
    ) -> None:
        self.conditions, self.latents = conditions, latents
        self.settings, self.lineup, self.path, self.team, self.device = settings, lineup, path, team, device
        self.held_out, self.train = held_out, train
        self.cells = lineup.cells(settings.seeds)
        self.folder: ComparisonFolder  # these two in the main process alone
        self.referee: Referee
        self.finished: set[str] = set()
        self.bar: Any = None

    def say(self, line: str) -> None:
        """A line on standard error, above the bar where there is one."""
        if self.team.is_main:
            if self.bar is not None:
                self.bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def open(self, cfg: Mapping[str, Any], pending: Sequence[TrainedArm]) -> dict[str, Any]:
        """Checks the folder and plans; writes nothing."""
        extractor = Lite0Features(device=self.device)
        definition = define(self.settings, self.lineup, extractor.id, cfg.get("data") or {}, self.held_out)
        self.folder = ComparisonFolder(self.path, definition)
        self.folder.check()
        self.finished = self.folder.finished(self.cells)
        plan = make_plan(self.settings, self.lineup, self.finished, pending, self.team.size)
        if not self.settings.dry_run:
            self.say(plan_text(plan))
        self.referee = Referee(
            self.settings,
            self.lineup,
            self.folder,
            extractor,
            self.held_out,
            self.device,
            self.say,
            (cfg.get("data") or {}).get("name"),
            self.train,
            self.conditions,
            None if self.latents is None else self.latents.held_out,
        )
        return {"plan": plan}

    def run(self) -> None:
        """Every cell that is not finished, one after the other."""
        self.finished = self.team.on_main(lambda: self.finished)
        todo = [(seed, one) for seed, one in self.cells if one.id(seed) not in self.finished]
        if not todo:
            self.say("every record stands already; only the report is written anew")
            return
        try:
            arms = list({id(one): one for _, one in todo}.values())
            self.team.on_main(lambda: self._begin(arms))
            # what went wrong in the first process's preparation is news to the others
            failures = self.team.on_main(lambda: [one.failure for one in self.lineup.contenders])
            for one, failure in zip(self.lineup.contenders, failures, strict=True):
                one.failure = failure
            with self._progress(todo):
                for seed, one in todo:
                    self._cell(seed, one)
        except KeyboardInterrupt:
            if self.team.is_main and (self.path / "compare.json").is_file():
                self.folder.cancel(self.cells, self.referee.provenance)
                self.finish(None)
                self.say(f"interrupted: {self.path / 'report.html'} shows what is there; the same command goes on")
            raise

    def finish(self, logger: Mapping[str, Any] | None) -> dict[str, Any]:
        """The report over everything in the folder, and what the command answers."""
        title = f"diffratio compare: {self.settings.weights}"
        report = write_report(self.path, title=title, compact=self.settings.compact)
        records = self.folder.records()
        if logger:
            track(logger, self.path, self.settings.name, list(records.values()))
        rows = [row_of(records[one.id(seed)]) for seed, one in self.cells if one.id(seed) in records]
        return {
            "report": str(report.html),
            "markdown": str(report.markdown),
            "csv": str(report.csv),
            **({"compact": str(report.compact)} if report.compact else {}),
            "finished_before": len(self.finished),
            "arms": rows,
        }

    def _begin(self, arms: list[Contender]) -> None:
        self.folder.begin()
        self.referee.prepare(arms)

    @contextlib.contextmanager
    def _progress(self, todo: Sequence[Cell]) -> Iterator[None]:
        from tqdm.auto import tqdm

        total = remaining(self.settings, todo, {one.id(seed) for seed, one in todo})
        # None: shown on a terminal, quiet in a log file
        disable = True if not self.team.is_main or not total else None
        with tqdm(total=total, desc="samples", unit="img", disable=disable, file=sys.stderr) as bar:
            self.bar = bar if not bar.disable else None
            try:
                yield
            finally:
                self.bar = None

    def _cell(self, seed: int, one: Contender) -> None:
        """One record; what goes wrong in an arm becomes its record, not the end of the comparison."""
        started = time.perf_counter()
        if one.unreachable or one.failure:
            status = "unreachable" if one.unreachable else "failed"
            self._write(lambda: self.referee.missing(one, seed, status, one.unreachable or one.failure or ""))
            return
        try:
            images = None
            if self.settings.n:
                if one.partner is not None:
                    self._know(one.partner, seed, f"{one.partner.arm.name}, which it is paired with, failed: ")
                if self._is_partner(one):
                    self._know(one, seed)
                else:
                    images = self._sample(one, seed)
        except ReportedElsewhere:  # the first process ends the comparison
            raise
        except MISSES as error:
            message = error
            self._write(lambda: failed(self.referee.missing(one, seed, "failed", ""), message))
            return
        self._write(lambda: self._measured(one, seed, images), started)

    def _measured(self, one: Contender, seed: int, images: Tensor | None) -> Record:
        try:
            return self.referee.record(one, seed, images)
        except MISSES as error:
            return failed(self.referee.missing(one, seed, "failed", ""), error)

    def _know(self, one: Contender, seed: int, prefix: str = "") -> None:
        """Makes sure that the samples of a dense arm are at hand: from memory, from the cache, or sampled."""
        if one.partner is not None:
            self._know(one.partner, seed, prefix)
        if self.team.on_main(lambda: self.referee.knows(one, seed)):
            return
        try:
            if one.failure:
                raise DiffratioError(one.failure)
            images = self._sample(one, seed)
        except MISSES as error:
            raise DiffratioError(f"{prefix}{error}") from None
        problem = self.team.on_main(lambda: self._taken(one, seed, images))
        if problem:
            raise DiffratioError(f"{prefix}{problem}")

    def _taken(self, one: Contender, seed: int, images: Tensor) -> str | None:
        """What is missed about a dense arm's samples; what ends the comparison is an error, for all processes."""
        try:
            self.referee.take_dense(one, seed, images)
        except MISSES as error:
            return str(error)
        return None

    def _is_partner(self, one: Contender) -> bool:
        return one is self.lineup.dense or any(other.partner is one for other in self.lineup.contenders)

    def _sample(self, one: Contender, seed: int) -> Tensor:
        def advance(count: int) -> None:
            if self.bar is not None:
                self.bar.update(min(count * self.team.size, self.bar.total - self.bar.n))

        one.forget_counts()
        return generate(
            one.pipe, self.settings.n, seed=seed, batch_size=self.settings.batch_size, steps=one.steps,
            guidance_scale=self.settings.guidance_scale, quiet=True, progress=advance,
        )  # fmt: skip

    def _write(self, make: Any, started: float | None = None) -> None:
        def work() -> None:
            record = make()
            self.folder.write(record)
            self.say(_sentence(record, started))

        self.team.on_main(work)


def _ask(lineup: Lineup, captions: Captions, labels: Tensor) -> None:
    """Makes every text-conditional arm sample the captions of these held-out images in turn."""
    texts = tuple(captions.texts[label] for label in labels.tolist())
    for one in lineup.contenders:
        if isinstance(one.pipe, PixelTextPipeline):
            if one.pipe.text != captions.encoder:
                raise DiffratioError(
                    f"{one.arm.weights} reads text of {one.pipe.text}, and data gives captions of {captions.encoder}; "
                    f"set data.text.encoder={one.pipe.text.name} data.text.tokens={one.pipe.text.tokens}"
                )
            one.pipe.prompts = texts
        elif one.pipe is not None and backbone_of(one.pipe.transformer).condition == "text":
            one.pipe.prompts = texts  # its own encoder was compared with the captions' already


def define(
    settings: CompareSettings, lineup: Lineup, extractor: str, data: Mapping[str, Any], held_out: HeldOut
) -> dict[str, Any]:
    """Everything that all records of a folder must share, as plain data; arms, budgets and seeds are not in it."""
    sampler, sampler_settings = sampler_of(lineup.dense.pipe.scheduler)
    grid = lineup.run.grid
    training = None
    if settings.train:
        training = [settings.train_experiment, settings.train_steps, list(settings.train_overrides)]
    return {
        "weights": settings.weights,
        "weights_sha256": lineup.dense.arm.weights_sha256,
        "finetuned": settings.finetuned,
        "finetuned_sha256": next(
            (one.arm.weights_sha256 for one in lineup.contenders if one.arm.weights == settings.finetuned), None
        ),
        "train": training,
        "n": settings.n,
        "steps": settings.steps,
        "guidance_scale": float(settings.guidance_scale),
        "sampler": [sampler, {key: _plain(value) for key, value in sampler_settings.items()}],
        "token_grid": [grid.height, grid.width],
        "noise": content_hash(initial_noise(0, [0, 1], (1, 4, 4))),
        "extractor": extractor,
        "data": data.get("name") or data.get("source"),
        "reference_n": settings.reference_n,
        "reference": [content_hash(one) for one in held_out(settings.reference_n)],
        **({} if (known := shown_to(lineup.dense)) is None else {"masks": content_hash(known.masks)}),
        "validation_n": settings.validation_n,
        "metrics": list(settings.metrics),
        "train_n": settings.train_n,
        "latency_batches": list(settings.latency_batches),
        "latency_repeats": settings.latency_repeats,
        "latency_modes": list(settings.latency_modes),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def _sentence(record: Record, started: float | None) -> str:
    place = f"{record.arm.name} at {record.budget:g}, seed {record.seed}"
    if record.status != "ok":
        return f"{place}: {record.status}: {record.message}"
    row = row_of(record)
    figures = [f"{row['macs_fraction']:.3f} of the MACs"]
    if row["kid_lite0"] is not None:
        figures.append(f"KID x 1000 {row['kid_lite0']:.2f}")
    if row["excess_loss"] is not None:
        figures.append(f"excess loss x 1000 {1e3 * row['excess_loss']:.2f}")
    spent = "" if started is None else f", {time.perf_counter() - started:.0f} s"
    return f"{place}: {', '.join(figures)}{spent}"
