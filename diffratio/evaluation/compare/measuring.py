"""From an arm and its samples to its record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.conditions import Captions, Classes, Conditions
from diffratio.cost.macs import Cost
from diffratio.errors import DiffratioError, first_line
from diffratio.evaluation.compare.arms import Contender, Lineup
from diffratio.evaluation.compare.cheats import probe
from diffratio.evaluation.compare.folder import ComparisonFolder
from diffratio.evaluation.compare.holes import loss_part, shown_to
from diffratio.evaluation.compare.settings import CompareSettings
from diffratio.evaluation.compare.timing import memory_of, time_arms
from diffratio.evaluation.evidence import Sentences
from diffratio.evaluation.features import FeatureExtractor
from diffratio.evaluation.masks import mask_overlays
from diffratio.evaluation.metrics import METRICS, Evidence, measure
from diffratio.evaluation.records import Record, provenance
from diffratio.evaluation.reference import cached_features
from diffratio.files import atomic_file
from diffratio.objectives import get_objective
from diffratio.objectives.validation import region_losses
from diffratio.sampling.generate import in_turn, sample_grid, save_npz
from diffratio.sampling.schedulers import sampler_of

REGIONS = 4
GRID, COLUMNS = 40, 10
MASK_LABELS = 4
MISSES = (DiffratioError, RuntimeError, ValueError, ArithmeticError)  # of one arm; what else goes wrong ends all
HeldOut = Callable[[int], tuple[Tensor, Tensor]]


class Referee:
    """Measures arms; lives in the main process alone.

    Args:
        settings: of the comparison.
        lineup: its arms.
        folder: where records and the cache are.
        extractor: of the features.
        held_out: n -> held-out images (n, C, H, W) in [-1, 1] and labels (n,).
        device: where arms run.
        say: told what is going on.
        data: name of the data set.
        train: n -> training images and labels, for the nearest-image distance; None leaves it out.
        conditions: what labels stand for; None takes them for classes.
        losses_on: the same as `held_out` for validation losses, in latent space; None takes `held_out`.
    """

    def __init__(
        self,
        settings: CompareSettings,
        lineup: Lineup,
        folder: ComparisonFolder,
        extractor: FeatureExtractor,
        held_out: HeldOut,
        device: str,
        say: Callable[[str], None],
        data: str | None = None,
        train: HeldOut | None = None,
        conditions: Conditions | None = None,
        losses_on: HeldOut | None = None,
    ) -> None:
        self.losses_on = losses_on or held_out
        self.data, self.train = data, train
        self.settings, self.lineup, self.folder, self.extractor = settings, lineup, folder, extractor
        self.held_out, self.device, self.say = held_out, device, say
        self.provenance = provenance(device, extractor.id)
        transformer = lineup.dense.pipe.transformer
        self.conditions = conditions or Classes(backbone_of(transformer).null_label(transformer))
        self.labels = in_turn(lineup.dense.pipe, settings.n)
        self._costs: dict[str, tuple[list[dict[str, Any]], float | None]] = {}
        self._losses: dict[str, Tensor] = {}
        self._dense: dict[str, Evidence] = {}
        self._real: Tensor | None = None
        self._train: Tensor | None = None
        self._texts: Sentences | None = None

    def prepare(self, arms: Sequence[Contender]) -> None:
        """Probes, times and weighs the arms, and takes their validation losses; a broken one gets its `failure`.

        What a finished record of another seed says of an arm's cost is taken from there.
        """
        probes: dict[str, Tensor] = {}
        finished = {key: record for key, record in self.folder.records().items() if record.status == "ok"}
        ready = [one for one in arms if one.unreachable is None]
        new = [one for one in ready if not self._recall(one, finished)]
        partners = [one.partner for one in ready if one.partner is not None]
        to_probe = {id(one) for one in new} | {id(one.partner) for one in new if one.partner is not None}
        for one in _each([*partners, *ready]):
            try:
                if id(one) in to_probe:
                    partner = one.partner
                    dense = probes.get(partner.key) if partner else None
                    one.flags, probes[one.key] = probe(one, dense, self.settings.guidance_scale)
                    for flag in one.flags:
                        self.say(f"{one.arm.name} at {one.budget:g}: {flag}")
                self._take_losses(one)
            except MISSES as error:
                one.failure = first_line(error)
        sound = [one for one in new if one.failure is None]
        timings = time_arms(self.settings, self.lineup.dense, sound, self.device, self.say)
        for one in sound:
            self._costs[one.key] = (timings[one.key], memory_of(self.settings, one, self.device))

    def _recall(self, one: Contender, finished: Mapping[str, Record]) -> bool:
        """Takes times, memory and flags from an arm's finished record, if this device measured them."""
        for seed in self.settings.seeds if one.seed is None else (one.seed,):
            record = finished.get(one.id(seed))
            if record is not None and record.provenance.get("device") == self.provenance["device"]:
                memory = record.cost["peak_memory_mib"]
                self._costs[one.key] = ([dict(row) for row in record.cost["latency"]], memory)
                one.flags = tuple(record.flags)
                return True
        return False

    def knows(self, one: Contender, seed: int) -> bool:
        """Whether the samples of a dense arm are here, or were kept by an earlier start."""
        if one.key + f"-{seed}" in self._dense:
            return True
        kept = self.folder.cached(_cache_name(one, seed))
        if kept is None or set(kept) != {"images", "features"} or len(kept["images"]) != self.settings.n:
            return False
        self._remember(one, seed, self._evidence(one, seed, kept["images"], kept["features"]))
        return True

    def take_dense(self, one: Contender, seed: int, images: Tensor) -> None:
        """Keeps the samples of a dense arm for those that are paired with it, here and in later starts."""
        features = self.extractor.extract(images)
        self.folder.cache(_cache_name(one, seed), {"images": images, "features": features})
        self._remember(one, seed, self._evidence(one, seed, images, features))

    def record(self, one: Contender, seed: int, images: Tensor | None) -> Record:
        """The finished record.

        Args:
            one: the arm.
            seed: of its noise.
            images: its samples (n, C, H, W); None where none were asked for, or the arm is dense and known.

        Raises:
            DiffratioError, RuntimeError, ValueError: the samples cannot be measured.
        """
        cost = self._cost(one, images)
        evidence = self._dense.get(f"{one.key}-{seed}")
        if evidence is None and images is not None:
            evidence = self._evidence(one, seed, images, self.extractor.extract(images))
        quality = self._quality(one, evidence)
        latency, memory = self._costs[one.key]
        extra = {}
        if one is self.lineup.dense and seed == self.settings.seeds[0] and self.settings.block_repeats:
            extra["block"] = self._block()
        sampler, sampler_settings = sampler_of(one.pipe.scheduler)
        measured: dict[str, Any] = {}
        if one.measured:
            measured = {"measured": True, "cache": surgery.statistics(one.pipe.transformer, self.lineup.run)}
        return Record(
            one.arm,
            one.budget,
            seed,
            n=self.settings.n,
            run=one.run,
            sampler=sampler,
            sampler_settings=sampler_settings,
            guidance_scale=self.settings.guidance_scale,
            schedule=one.schedule,
            cost={
                "macs": cost.total,
                "macs_dense": cost.dense,
                "fraction": cost.fraction,
                "latency": latency,
                "peak_memory_mib": memory,
                **measured,
            },
            quality=quality,
            images={} if evidence is None else self._pictures(one, seed, evidence.images),
            extra=extra,
            provenance=self.provenance,
            flags=one.flags,
            paired_with=one.paired_with,
        )

    def _cost(self, one: Contender, images: Tensor | None) -> Cost:
        """By description, or where it depends on the input, counted while these very samples were made."""
        assert one.cost is not None
        if images is None or not one.measured:
            return one.cost
        return surgery.macs(one.pipe.transformer, run=self.lineup.run)

    @property
    def classes(self) -> list[int] | None:
        """Class of every sample; None where they are asked for by prompts."""
        numbers = [label for label in self.labels if isinstance(label, int)]
        return numbers if len(numbers) == len(self.labels) else None

    @property
    def prompts(self) -> tuple[str, ...] | None:
        """Prompt of every sample; None where they are asked for by class."""
        return None if self.classes is not None else tuple(str(label) for label in self.labels)

    def missing(self, one: Contender, seed: int, status: str, message: str) -> Record:
        """The record of an arm without figures."""
        return Record(
            one.arm,
            one.budget,
            seed,
            status=status,
            message=message,
            provenance=self.provenance,
            flags=one.flags,
            paired_with=one.paired_with,
        )

    def _quality(self, one: Contender, evidence: Evidence | None) -> dict[str, Any]:
        if evidence is not None:
            names = [name for name, metric in METRICS.items() if metric.minimum <= len(evidence.images)]
            return measure([*names, *self.settings.metrics], evidence)
        losses = self._losses.get(one.key)
        if losses is None:
            return {}
        # without samples the held-out images are what the figures rest on
        empty = torch.empty(len(losses), 0)
        alone = Evidence(empty, empty, empty, losses=losses, reference_losses=self._reference(one))
        return measure(("excess_loss", "excess_loss_regions"), alone)

    def _evidence(self, one: Contender, seed: int, images: Tensor, features: Tensor) -> Evidence:
        if self._real is None:
            images_of_data = self.held_out(self.settings.reference_n)[0]
            self._real = cached_features(images_of_data, self.extractor, self.data or "data")
        return Evidence(
            images,
            features,
            self._real,
            labels=None if self.classes is None else torch.tensor(self.classes),
            prompts=self.prompts,
            sentences=self._sentences(),
            known=None if (known := shown_to(one)) is None else known.take(range(len(images))),
            dense=self._dense[f"{one.partner.key}-{seed}"] if one.partner else None,
            losses=self._losses.get(one.key),
            reference_losses=self._reference(one),
            train=self._train_features if self.train is not None and self.settings.train_n else None,
            data=self.data,
            extractor=self.extractor.id,
        )

    def _train_features(self) -> Tensor:
        if self._train is None:
            assert self.train is not None
            images = self.train(self.settings.train_n)[0]
            self._train = cached_features(images, self.extractor, f"{self.data or 'data'}-train")
        return self._train

    def _sentences(self) -> Sentences | None:
        if not isinstance(self.conditions, Captions) or self.prompts is None or not self.settings.train_n:
            return None
        if self._texts is None:
            assert self.train is not None
            vectors = self.conditions.sentences()
            self._texts = Sentences(
                vectors[self.conditions.numbers(self.prompts)],
                vectors[self.held_out(self.settings.reference_n)[1]],
                vectors[self.train(self.settings.train_n)[1]],
            )
        return self._texts

    def _remember(self, one: Contender, seed: int, evidence: Evidence) -> None:
        """Only those of the present seed are needed again; samples of large comparisons fill memory."""
        self._dense = {key: kept for key, kept in self._dense.items() if key.endswith(f"-{seed}")}
        self._dense[f"{one.key}-{seed}"] = evidence

    def _reference(self, one: Contender) -> Tensor | None:
        return self._losses.get(one.partner.key) if one.partner else None

    def _take_losses(self, one: Contender) -> None:
        """Paired validation losses (v, R), on the same images at the same noise for every arm."""
        if not self.settings.validation_n or not one.has_losses:
            return
        name = _losses_name(one)
        kept = self.folder.cached(name)
        if kept is not None and set(kept) == {"losses"}:
            self._losses[one.key] = kept["losses"]
            return
        objective = get_objective(self.lineup.objective)
        images, labels = self.losses_on(self.settings.validation_n)
        transformer = one.pipe.transformer
        family = backbone_of(transformer)

        def predict(inputs: Tensor, levels: Tensor, own: Tensor) -> Tensor:
            timestep = objective.timestep(family.timestep(levels))
            return family.predict(transformer, inputs, timestep, self.conditions.arguments(own))

        known = shown_to(one)
        masks = None if known is None else known.take(range(len(images))).masks
        losses = region_losses(
            predict, objective, images.to(self.device), labels.to(self.device), REGIONS,
            masks=masks, part=loss_part(self.settings.weights),
        )  # fmt: skip
        self._losses[one.key] = losses
        self.folder.cache(name, {"losses": losses})

    def _pictures(self, one: Contender, seed: int, images: Tensor) -> dict[str, Any]:
        path = f"images/{one.id(seed)}.png"
        with atomic_file(self.folder.path / path) as temporary:
            sample_grid(images[:GRID], columns=COLUMNS).save(temporary, format="PNG")
        if self.settings.save_npz:
            save_npz(self.folder.path / "npz" / f"{one.id(seed)}.npz", images, self.classes)
        names = one.pipe.config.get("id2label") or {}
        heads = [names.get(str(label), str(label)) for label in self.labels[:COLUMNS]]
        return {"samples": path, "masks": self._masks(one, seed), "labels": heads}

    def _masks(self, one: Contender, seed: int) -> list[str]:
        method = one.method
        if method is None or not method.token_level or seed != self.settings.seeds[0]:
            return []
        return mask_overlays(
            one.pipe,
            self.folder.path,
            one.id(seed),
            labels=tuple(self.labels[:MASK_LABELS]),
            steps=one.steps,
            guidance_scale=self.settings.guidance_scale,
            seed=seed,
        )

    def _block(self) -> dict[str, Any]:
        from diffratio.evaluation.block import block_table

        return block_table(repeats=self.settings.block_repeats, device=self.device)


def row_of(record: Record) -> dict[str, Any]:
    """Key figures of a record."""
    latency = record.cost.get("latency") or []
    return {
        "arm": record.arm.name,
        "budget": record.budget,
        "seed": record.seed,
        "status": record.status,
        "message": record.message,
        "macs_fraction": record.cost.get("fraction"),
        "kid_lite0": _value(record.quality.get("kid_lite0")),
        "excess_loss": _value(record.quality.get("excess_loss")),
        "paired_with": record.paired_with,
        "flags": list(record.flags),
        "time_fraction": {
            str(one["batch"]) + ("" if one["mode"] == "eager" else f" {one['mode']}"): (
                one["median_ms"] / one["dense_median_ms"]
            )
            for one in latency
            if one["dense_median_ms"]
        },
    }


def failed(record: Record, error: Exception) -> Record:
    """A record whose measuring went wrong."""
    return dataclasses.replace(record, status="failed", message=first_line(error))


def _value(entry: Any) -> float | None:
    return entry.get("value") if isinstance(entry, dict) else entry


def _cache_name(one: Contender, seed: int) -> str:
    return f"{one.id(seed)}-{(one.arm.weights_sha256 or 'hub')[:8]}"


def _losses_name(one: Contender) -> str:
    """Changes with the weights and with every setting of the method."""
    settings = json.dumps([one.arm.weights, one.arm.weights_sha256, dict(one.arm.method)], sort_keys=True)
    return f"losses-{one.key}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _each(arms: Sequence[Contender]) -> list[Contender]:
    """Each arm once, those that others are paired with first."""
    return list({id(one): one for one in sorted(arms, key=lambda one: one.partner is not None)}.values())
