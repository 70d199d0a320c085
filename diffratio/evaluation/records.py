"""One JSON record per (arm, budget, seed): all that a report knows of a comparison."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError, unknown
from diffratio.files import read_json, write_json

SCHEMA = 1
STATUSES = ("ok", "failed", "unreachable", "cancelled")
PACKAGES = (
    "diffratio",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "lightning",
    "datasets",
    "numpy",
    "torchmetrics",
)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: weights and the method that runs on them.

    Args:
        name: unique name of the arm.
        weights: name or folder of the weights.
        method: the method's config as plain data; `name` is its registered name.
        as_published: False where the method was widened beyond its paper to reach the budget.
        finetuned_steps: optimizer steps the weights were fine-tuned for, or None.
        weights_sha256: digest of the weights, or None.
    """

    name: str
    weights: str
    method: Mapping[str, Any]
    as_published: bool = True
    finetuned_steps: int | None = None
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise DiffratioError(f"arm name must be a non-empty string, got {self.name!r}")
        if not isinstance(self.weights, str):
            raise DiffratioError(f"arm {self.name!r}: weights must be a string, got {self.weights!r}")
        if not isinstance(self.method, Mapping) or not isinstance(self.method.get("name"), str):
            raise DiffratioError(f"arm {self.name!r}: method must be a mapping with a 'name', got {self.method!r}")
        if not isinstance(self.as_published, bool):
            raise DiffratioError(f"arm {self.name!r}: as_published must be true or false, got {self.as_published!r}")
        steps = self.finetuned_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
            raise DiffratioError(f"arm {self.name!r}: finetuned_steps must be an integer or null, got {steps!r}")


@dataclass(frozen=True)
class Record:
    """What one arm cost and gave at one budget with one seed; anything not measured is None or absent.

    Args:
        arm: weights and method.
        budget: fraction of the dense run's MACs that was asked for, in (0, 1].
        seed: seed of the noise and labels.
        n: samples that the quality figures rest on.
        status: `ok`, `failed`, `unreachable` or `cancelled`.
        message: why it is not `ok`.
        run: the sampling run, after the method adapted it.
        sampler: name of the sampler.
        sampler_settings: its settings, where they differ from the class's defaults.
        guidance_scale: classifier-free guidance scale.
        schedule: `{"bins": [[...], ...]}`, integer bins 0..10 of shape [layer][region].
        cost: `macs`, `macs_dense`, `fraction`, `latency` (a list of timings), `peak_memory_mib`.
        quality: estimates by metric name: a number, or a mapping with `value`, `low`, `high`, `stderr`, `n`.
        images: `samples` (one PNG) and `masks` (a list of PNGs), paths relative to the comparison folder.
        extra: named tables `{"title": ..., "rows": [{column: value}]}`.
        flags: what the checks on cheating found (costs that are not the counted ones, a seed without effect ...).
        paired_with: name of the dense arm that every paired figure refers to; None for the dense model.
        provenance: where and with what it was measured (see `provenance`).
    """

    arm: Arm
    budget: float
    seed: int
    n: int | None = None
    status: str = "ok"
    message: str = ""
    run: SamplingRun | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    schedule: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sampler_settings: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()
    paired_with: str | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise unknown("record status", self.status, STATUSES)
        if not _is_number(self.budget) or not 0.0 < self.budget <= 1.0:
            raise DiffratioError(f"record budget must be a number in (0, 1], got {self.budget!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise DiffratioError(f"record seed must be an integer, got {self.seed!r}")
        where = f"record {self.id!r}"
        if not isinstance(self.message, str):
            raise DiffratioError(f"{where}: message must be a string, got {self.message!r}")
        _require_optional_number(self.n, f"{where}: n")
        _require_optional_number(self.guidance_scale, f"{where}: guidance_scale")
        for part in ("cost", "quality", "images", "extra", "provenance", "sampler_settings"):
            value = getattr(self, part)
            if value is None:
                object.__setattr__(self, part, {})
            elif not isinstance(value, Mapping):
                raise DiffratioError(f"{where}: {part} must be a mapping or null, got {type(value).__name__}")
            _require_finite(value, f"{where}: {part}")
        if isinstance(self.flags, str) or not all(isinstance(flag, str) for flag in self.flags or ()):
            raise DiffratioError(f"{where}: flags must be a list of strings or null, got {self.flags!r}")
        object.__setattr__(self, "flags", tuple(self.flags or ()))
        if self.paired_with is not None and not isinstance(self.paired_with, str):
            raise DiffratioError(f"{where}: paired_with must be an arm's name or null, got {self.paired_with!r}")
        _check_schedule(self.schedule, where)
        _check_cost(self.cost, where)
        for name, value in self.quality.items():
            entries = value if isinstance(value, list) else [value]
            for entry in entries:
                _check_estimate(entry, f"{where}: quality {name}")
        _check_images(self.images, where)
        _check_tables(self.extra, where)

    @property
    def id(self) -> str:
        """Name of the record and of its file."""
        return record_id(self.arm.name, self.budget, self.seed)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        document["arm"] = {f.name: getattr(self.arm, f.name) for f in fields(self.arm)}
        document["run"] = None if self.run is None else self.run.to_json()
        document["flags"] = list(self.flags)
        return {"schema": SCHEMA, "id": self.id, **document}

    @classmethod
    def from_json(cls, document: Any, where: str = "record") -> Record:
        """Reads plain data.

        Args:
            document: what `to_json` returned.
            where: what to call it in errors.

        Raises:
            DiffratioError: another schema, a missing or unknown key, or a value that cannot be.
        """
        if not isinstance(document, Mapping) or "schema" not in document:
            raise DiffratioError(f"{where} is not a record: expected an object with schema {SCHEMA}; remove it")
        if document["schema"] != SCHEMA:
            raise DiffratioError(
                f"{where} has schema {document['schema']!r}, this version reads {SCHEMA}; compare again in a new folder"
            )
        content = {key: value for key, value in document.items() if key not in ("schema", "id")}
        try:
            arm = dict(content.pop("arm"))
            run = content.pop("run", None)
            record = cls(
                arm=_build(Arm, arm), run=None if run is None else SamplingRun.from_json(run), **_known(cls, content)
            )
        except DiffratioError as error:
            raise DiffratioError(f"{where}: {error}") from None
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise DiffratioError(f"{where} is not a record: {type(error).__name__} {error}") from None
        if document.get("id") != record.id:
            raise DiffratioError(f"{where}: id is {document.get('id')!r}, its arm, budget and seed say {record.id!r}")
        return record


def record_id(arm: str, budget: float, seed: int) -> str:
    """Name of a record, safe as a file name: `record_id("diffcr", 0.8, 0)` is `diffcr-80-s0`."""
    name = re.sub(r"[^A-Za-z0-9_.+]+", "-", arm).strip("-.") or "arm"
    return f"{name}-{100 * budget:g}-s{seed}"


def write_record(folder: str | Path, record: Record, replace: bool = False) -> Path:
    """Writes `records/<id>.json` atomically.

    Args:
        folder: the comparison folder.
        record: what to write.
        replace: replace an earlier record with the same id; any other file in its place stays an error.

    Returns:
        The path of the file.

    Raises:
        DiffratioError: the place is taken, or the folder cannot be written.
    """
    path = Path(folder) / "records" / f"{record.id}.json"
    if path.exists():
        if not replace:
            raise DiffratioError(f"record {str(path)!r} exists already; choose another folder or replace it knowingly")
        _read_record(path)
    try:
        write_json(path, record.to_json())
    except TypeError as error:
        raise DiffratioError(f"record {record.id!r} holds a value that JSON cannot ({error}); use plain data") from None
    return path


def read_records(folder: str | Path) -> list[Record]:
    """Reads every record of a comparison folder, sorted by falling budget, arm and seed. Changes nothing.

    Raises:
        DiffratioError: no records, a file that is not a record of this schema, or two records of the same thing.
    """
    place = Path(folder) / "records"
    if not place.is_dir():
        raise DiffratioError(f"{str(folder)!r} is not a comparison folder: it has no 'records'; make one with compare")
    records = []
    for path in sorted(place.iterdir()):
        if path.name.startswith("."):  # leftovers of an interrupted atomic write, and of file managers
            continue
        if path.suffix != ".json" or not path.is_file():
            raise DiffratioError(f"{str(path)!r} is not a record (allowed are <id>.json files); move it elsewhere")
        records.append(_read_record(path))
    if not records:
        raise DiffratioError(f"{str(place)!r} holds no records; make some with compare")
    return sorted(records, key=lambda r: (-r.budget, r.arm.name, r.seed))


def provenance(device: str = "cpu", extractor: str | None = None) -> dict[str, Any]:
    """Where and with what something is measured: git state, packages, Python, device, time.

    Args:
        device: torch device string that the measuring runs on.
        extractor: id of the feature extractor, where there is one.

    Returns:
        Plain data; `git` is None where the package does not run from a git checkout.
    """
    from diffratio.cost.latency import device_name

    return {
        "git": _git_state(Path(__file__).resolve().parent),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "device": device_name(device),
        "extractor": extractor,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read_record(path: Path) -> Record:
    """One file, named by its id: that no two files hold the same arm, budget and seed follows from it."""
    record = Record.from_json(read_json(path, "record"), where=f"record {str(path)!r}")
    if path.stem != record.id:
        raise DiffratioError(f"record {str(path)!r} holds {record.id!r}: rename it to <id>.json or remove it")
    return record


def _known(cls: type, content: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    for key in content:
        if key not in names:
            raise unknown(f"{cls.__name__.lower()} key", key, names)
    return content


def _build(cls: type[Arm], content: dict[str, Any]) -> Arm:
    return cls(**_known(cls, content))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_optional_number(value: object, what: str) -> None:
    if value is not None and not _is_number(value):
        raise DiffratioError(f"{what} must be a finite number or null, got {value!r}")


def _require_finite(value: object, what: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_finite(item, f"{what}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _require_finite(item, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DiffratioError(f"{what} must be finite, got {value}; write null where nothing was measured")


def _check_estimate(value: object, what: str) -> None:
    if isinstance(value, Mapping):
        if "value" not in value:
            raise DiffratioError(f"{what} must have a 'value', got the keys {', '.join(map(str, value)) or 'none'}")
        for key, item in value.items():
            _require_optional_number(item, f"{what}.{key}")
    else:
        _require_optional_number(value, what)


def _check_cost(cost: Mapping[str, Any], where: str) -> None:
    for key in ("macs", "macs_dense", "fraction", "peak_memory_mib"):
        _require_optional_number(cost.get(key), f"{where}: cost.{key}")
    timings = cost.get("latency") or []
    if not isinstance(timings, list) or not all(isinstance(timing, Mapping) for timing in timings):
        raise DiffratioError(f"{where}: cost.latency must be a list of timings or null, got {timings!r}")
    for timing in timings:
        if not _is_number(timing.get("batch")) or not isinstance(timing.get("mode"), str):
            raise DiffratioError(f"{where}: a timing needs a number 'batch' and a string 'mode', got {dict(timing)!r}")
        for key in ("median_ms", "q1_ms", "q3_ms", "dense_median_ms", "repeats", "efficiency"):
            _require_optional_number(timing.get(key), f"{where}: cost.latency {key}")


def _check_schedule(schedule: Mapping[str, Any] | None, where: str) -> None:
    if schedule is None:
        return
    bins = schedule.get("bins") if isinstance(schedule, Mapping) else None
    if not isinstance(bins, Sequence) or not bins or not all(isinstance(row, Sequence) and row for row in bins):
        raise DiffratioError(f"{where}: schedule must hold 'bins' as [layer][region], got {bins!r}")
    if len({len(row) for row in bins}) != 1:
        raise DiffratioError(f"{where}: every layer of a schedule needs the same number of regions, got {bins!r}")
    for value in (item for row in bins for item in row):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10:
            raise DiffratioError(f"{where}: schedule bins must be integers 0..10, got {value!r}")


def _check_images(images: Mapping[str, Any], where: str) -> None:
    masks = images.get("masks") or []
    if not isinstance(masks, list):
        raise DiffratioError(f"{where}: images.masks must be a list of paths or null, got {masks!r}")
    for path in [images.get("samples"), *masks]:
        if path is None:
            continue
        # Paths end up in file reads and in links, so only plain relative names are let in.
        parts = PurePosixPath(path).parts if isinstance(path, str) else ()
        if not parts or path.startswith("/") or ".." in parts or not re.fullmatch(r"[A-Za-z0-9_.+/-]+\.png", path):
            raise DiffratioError(f"{where}: image {path!r} must be a PNG's path relative to the comparison folder")


def _check_tables(extra: Mapping[str, Any], where: str) -> None:
    for name, table in extra.items():
        rows = table.get("rows") if isinstance(table, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise DiffratioError(f"{where}: extra.{name} must be a table with 'title' and 'rows' (a list of objects)")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(place: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git_state(place: Path) -> str | None:
    """Short revision, with `-dirty` where files differ from it. None where `place` is not tracked (a wheel)."""
    if _git(place, "ls-files", "--error-unmatch", "records.py") is None:
        return None
    revision = _git(place, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return f"{revision}-dirty" if _git(place, "status", "--porcelain") else revision
