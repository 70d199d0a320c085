"""The folder of a comparison: what defines it, what is finished in it, and what a rerun need not compute again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffratio.errors import DiffratioError, shortened
from diffratio.evaluation.compare.arms import Contender
from diffratio.evaluation.records import Record, read_records, write_record
from diffratio.files import atomic_file, read_json, writable_folder, write_json

FORMAT, VERSION = "diffratio-comparison", 1
KEPT = ("ok", "unreachable")


class ComparisonFolder:
    """Records, cache and definition of one comparison; nothing is written before `begin`.

    Args:
        path: the output folder.
        definition: plain settings that every record of the folder must share.
        extractor: id of the feature extractor, part of the cache's key.
    """

    def __init__(self, path: Path, definition: Mapping[str, Any]) -> None:
        self.path, self.definition = path, dict(definition)
        self._key = hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    def records(self) -> dict[str, Record]:
        """What stands there, by id.

        Raises:
            DiffratioError: a file that is not a record of this version.
        """
        place = self.path / "records"
        if not place.is_dir() or not any(not file.name.startswith(".") for file in place.iterdir()):
            return {}
        return {record.id: record for record in read_records(self.path)}

    def check(self) -> None:
        """Raises DiffratioError where the folder holds another comparison, or something else."""
        file, found = self.path / "compare.json", self.records()
        if not file.is_file():
            if found:
                raise DiffratioError(
                    f"{str(self.path)!r} holds records but no compare.json that says how they were made; "
                    "choose another paths.output_dir"
                )
            return
        document = read_json(file, "comparison")
        if not isinstance(document, Mapping) or document.get("format") != FORMAT or document.get("version") != VERSION:
            raise DiffratioError(
                f"{str(file)!r} is not a comparison of this version ({FORMAT} {VERSION}); "
                "choose another paths.output_dir"
            )
        before = document.get("settings") or {}
        if not isinstance(before, Mapping):
            raise DiffratioError(f"{str(file)!r} is damaged (settings is no object); choose another paths.output_dir")
        for key in {**before, **self.definition}:
            old, new = before.get(key), self.definition.get(key)
            if old != new:
                raise DiffratioError(
                    f"{str(self.path)!r} was begun with {key}={shortened(old)}, now it is {shortened(new)}; "
                    "choose another paths.output_dir (arms, budgets and seeds may be added)"
                )

    def finished(self, cells: list[tuple[int, Contender]]) -> set[str]:
        """Ids of the cells that need nothing more.

        Raises:
            DiffratioError: a finished record of an arm with other weights or settings than now.
        """
        records = {key: record for key, record in self.records().items() if record.status in KEPT}
        for seed, one in cells:
            record = records.get(one.id(seed))
            if record is None or record.status != "ok":
                continue
            # through JSON, since a record read back holds lists where a config holds tuples
            now = json.loads(json.dumps({"weights_sha256": one.arm.weights_sha256, "method": dict(one.arm.method)}))
            then = {"weights_sha256": record.arm.weights_sha256, "method": dict(record.arm.method)}
            for key, value in now.items():
                if then[key] != value:
                    raise DiffratioError(
                        f"record {record.id!r} was measured with {key}={shortened(then[key])}, now it is "
                        f"{shortened(value)}; choose another paths.output_dir"
                    )
        # what was out of reach may no longer be, of another release or with another schedule's file
        states = {one.id(seed): (records.get(one.id(seed)), one.unreachable) for seed, one in cells}
        return {key for key, (record, still) in states.items() if record and (record.status == "ok" or still)}

    def begin(self) -> None:
        """Makes the folder and writes its definition."""
        writable_folder(self.path)
        if not (self.path / "compare.json").is_file():
            write_json(self.path / "compare.json", {"format": FORMAT, "version": VERSION, "settings": self.definition})

    def write(self, record: Record) -> None:
        """Writes a record, in place of one that was not finished."""
        write_record(self.path, record, replace=True)

    def cancel(self, cells: list[tuple[int, Contender]], provenance: Mapping[str, Any]) -> None:
        """Says of every cell without a record that it was not reached."""
        present = self.records()
        for seed, one in cells:
            if one.id(seed) not in present:
                self.write(
                    Record(
                        one.arm,
                        one.budget,
                        seed,
                        status="cancelled",
                        message="interrupted before it was measured",
                        provenance=provenance,
                        paired_with=one.paired_with,
                    )
                )

    def cached(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of an earlier start of this very comparison; None where there are none, or they are damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path / "cache" / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return None

    def cache(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors for a later start."""
        from safetensors.torch import save_file

        with atomic_file(self.path / "cache" / f"{name}.safetensors") as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, {"key": self._key})
