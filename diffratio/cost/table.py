"""The measured cost table: milliseconds of each block by bin on one machine, in a file that solvers take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffratio.cost.macs import BINS, CostTable, Description
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError, unknown
from diffratio.files import read_json, write_json
from diffratio.tokens.grid import TokenGrid

FORMAT, VERSION = "diffratio-cost-table", 1
MARGIN = 0.01
DTYPES = ("float32", "bfloat16", "float16")
_MOST = 1 << 20  # of any count
_LARGEST = 4096  # of layers, tokens at a side and alignment, as elsewhere
_COUNTS = {"width": 1, "text_tokens": 0, "batch": 1, "alignment": 1, "threads": 1, "repeats": 1, "warmup": 0}
_NAMES = ("family", "model", "device")


@dataclass(frozen=True)
class LatencyTable:
    """What one model's blocks take on one machine, routed as they really run: ranking, gather and scatter included.

    Args:
        family: backbone name.
        model: class of the transformer.
        width: channels d of an image token.
        grid: token grid of one sample.
        text_tokens: text tokens of one sample.
        batch: samples in a forward; the two guidance halves of one picture are 2.
        alignment: computed tokens were rounded up to a multiple of this.
        shapes: for each block, which row of `block_ms` holds for it: blocks of equal shape share one, their mean.
        block_ms: milliseconds of one block by bin, [shape][bin 0..10]; bin 0 is what bypassing costs.
        outer_ms: milliseconds of one forward outside the blocks.
        dtype: computing type.
        device: name of the processor or GPU.
        threads: CPU threads.
        repeats: timed calls, interleaved; medians are given.
        warmup: calls before those.
        forward_ms: whole forwards that were timed beside them, by what was computed; a check, nothing is solved on it.
        provenance: versions, git state, time.
    """

    family: str
    model: str
    width: int
    grid: TokenGrid
    text_tokens: int
    batch: int
    alignment: int
    shapes: tuple[int, ...]
    block_ms: tuple[tuple[float, ...], ...]
    outer_ms: float
    dtype: str
    device: str
    threads: int
    repeats: int
    warmup: int
    forward_ms: Mapping[str, float] = field(default_factory=dict, hash=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in _NAMES:
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise DiffratioError(f"cost table: {name} {getattr(self, name)!r} must be a name")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _MOST:
                raise DiffratioError(f"cost table: {name} {value!r:.60} must be an integer of {least} to {_MOST}")
        if self.alignment > _LARGEST:
            raise DiffratioError(f"cost table: alignment {self.alignment!r} must be an integer in 1..{_LARGEST}")
        if self.dtype not in DTYPES:
            raise unknown("dtype of a cost table", self.dtype, DTYPES)
        self._check_shapes()
        _check_ms("outer_ms", self.outer_ms)
        for name, value in self.forward_ms.items():
            _check_ms(f"forward_ms[{name!r}]", value)

    def _check_shapes(self) -> None:
        rows = len(self.block_ms)
        if not 1 <= len(self.shapes) <= _LARGEST or sorted(set(self.shapes)) != list(range(rows)):
            raise DiffratioError(
                f"cost table: shapes must name for each of 1..{_LARGEST} blocks one of the {rows} rows of block_ms, "
                "and every row some block"
            )
        for shape, row in enumerate(self.block_ms):
            if len(row) != len(BINS):
                raise DiffratioError(
                    f"cost table: block_ms[{shape}] has {len(row)} bins; it takes {len(BINS)}, 0 to 10"
                )
            for bin_, value in enumerate(row):
                _check_ms(f"block_ms[{shape}][{bin_}]", value)
            if row[-1] == 0:
                raise DiffratioError(
                    f"cost table: block_ms[{shape}][10], the dense block, takes no time; measure again"
                )

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return len(self.shapes)

    @property
    def allowed_bins(self) -> tuple[int, ...]:
        """Bins that pay on this machine, in every block."""
        return paying_bins(self.block_ms)

    def costs(self, run: SamplingRun) -> CostTable:
        """The table that solvers take, for a run on its grid; dense is the sum of its own parts."""
        cells = tuple(self.block_ms[shape] for shape in self.shapes)
        dense = self.outer_ms + sum(row[-1] for row in cells)
        return CostTable(cells, self.outer_ms, dense, run, "latency", self.alignment, self.allowed_bins)

    def run_ms(self, run: SamplingRun, fraction: float = 1.0) -> float:
        """Milliseconds of a whole run's forwards, each of `batch` samples (with guidance: of batch / 2 pictures).

        Args:
            run: the run.
            fraction: of the dense run, as `costs(run).fraction` gives it.
        """
        return fraction * self.costs(run).dense * run.forwards / run.halves

    def require(self, description: Description, run: SamplingRun) -> LatencyTable:
        """Itself, if it was timed on such a model and grid.

        Raises:
            DiffratioError: it was not; says what it was timed on.
        """
        own = _facts(self.family, self.layers, self.width, self.grid, self.text_tokens)
        other = _facts(description.family, description.layers, description.width, run.grid, run.text_tokens)
        if own != other:
            raise DiffratioError(
                f"cost table: it was timed on {own}, and this is {other}; `diffratio bench table` on this model"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for one in dataclasses.fields(self):
            document[one.name] = getattr(self, one.name)
        document["grid"] = [self.grid.height, self.grid.width]
        document["shapes"] = list(self.shapes)
        document["block_ms"] = [list(row) for row in self.block_ms]
        document["forward_ms"], document["provenance"] = dict(self.forward_ms), dict(self.provenance)
        document["allowed_bins"] = list(self.allowed_bins)  # for readers; it follows from block_ms
        return document

    @classmethod
    def from_json(cls, document: Any) -> LatencyTable:
        """Raises DiffratioError where the document is not a cost table of this release."""
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise DiffratioError(f"cost table: not a document of format {FORMAT!r}; `diffratio bench table` writes one")
        if document.get("version") != VERSION:
            raise DiffratioError(
                f"cost table: version {document.get('version')!r}, and this release reads version {VERSION}; "
                "`diffratio bench table` again"
            )
        names = {one.name for one in dataclasses.fields(cls)}
        values = {key: value for key, value in document.items() if key not in ("format", "version", "allowed_bins")}
        if missing := sorted(names - set(values)):
            raise DiffratioError(f"cost table: it has no {missing[0]}; `diffratio bench table` again")
        for key in values:
            if key not in names:
                raise unknown("key of a cost table", key, names)
        for name, kind in (("shapes", list), ("block_ms", list), ("forward_ms", Mapping), ("provenance", Mapping)):
            if not isinstance(values[name], kind):
                raise DiffratioError(f"cost table: {name} must be a {kind.__name__.lower()}, got {values[name]!r:.60}")
        if not all(isinstance(row, list) for row in values["block_ms"]):
            raise DiffratioError("cost table: block_ms must be a list of lists, [shape][bin]")
        if any(type(shape) is not int for shape in values["shapes"]):
            raise DiffratioError("cost table: shapes must be integers, the row of block_ms of each block")
        if not isinstance(values["grid"], list) or len(values["grid"]) != 2:
            raise DiffratioError(f"cost table: grid {values['grid']!r:.60} must be [height, width]")
        values["grid"] = TokenGrid(*values["grid"])
        values["shapes"] = tuple(values["shapes"])
        values["block_ms"] = tuple(map(tuple, values["block_ms"]))
        return cls(**values)


def paying_bins(rows: Sequence[Sequence[float]], margin: float = MARGIN) -> tuple[int, ...]:
    """Bins that save time in every block: cheaper than each higher bin that does.

    Args:
        rows: cost of each kind of block by bin, [kind][bin 0..10].
        margin: least saving, as a fraction of the dense block's cost.

    Returns:
        Rising bins; 10 is always among them.

    Example:
        >>> paying_bins([[0, 1, 2, 3, 4, 5, 6, 10, 10, 10.5, 10]])
        (0, 1, 2, 3, 4, 5, 6, 10)
    """
    found = [BINS[-1]]
    for bin_ in reversed(BINS[:-1]):
        if all(row[bin_] < row[found[-1]] - margin * row[-1] for row in rows):
            found.append(bin_)
    return tuple(reversed(found))


def save_cost_table(path: str | Path, table: LatencyTable) -> None:
    """Writes a table as JSON, whole or not at all."""
    write_json(path, table.to_json())


def load_cost_table(path: str | Path) -> LatencyTable:
    """Reads a table that `diffratio bench table` wrote.

    Raises:
        DiffratioError: no such file, or not a table; names the file.
    """
    document = read_json(path, "cost table")
    try:
        return LatencyTable.from_json(document)
    except DiffratioError as error:
        raise DiffratioError(f"{str(path)!r}: {error}") from None


def _facts(family: str, layers: int, width: int, grid: TokenGrid, text: int) -> str:
    words = f", {text} text tokens" if text else ""
    return f"{family} of {layers} blocks, width {width}, {grid.height}x{grid.width} tokens{words}"


def _check_ms(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise DiffratioError(f"cost table: {name} {value!r} must be a finite number of milliseconds, at least 0")
