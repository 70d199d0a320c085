"""A sensitivity map with its path, as one file: Gram matrices as tensors, everything else as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.checkpoint import shipped_beside
from diffratio.cost.macs import CostTable, Description, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.files import atomic_file, parse_json
from diffratio.routing.allocate import ErrorModel, Path, allocate
from diffratio.routing.schedule import KeepSchedule, Table
from diffratio.surgery import weights_digest

FORMAT, VERSION, SUFFIX = "diffratio-sensitivity", 1, ".safetensors"
MAPS = "maps"  # folder of the maps that ship, beside the checkpoints that they were measured on
_TENSORS = ("gram", "cross", "offset", "weights")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What was measured on one set of weights for one run.

    Args:
        model: error model around the dense table.
        path: decrements from the dense table down, measured anew on the way.
        run: the run whose steps the budgets count.
        weights_sha256: `weights_digest` of the transformer.
        ranking: training-free ranking of the tokens while measuring.
        n: images.
        seed: of levels, noise and random rankings.
        unit: unit of the costs that the path was solved on.
    """

    model: ErrorModel
    path: Path
    run: SamplingRun
    weights_sha256: str
    ranking: str
    n: int
    seed: int = 0
    unit: str = "macs"

    def schedule(
        self, description: Description, budget: float, router: bool = True, *, costs: CostTable | None = None
    ) -> KeepSchedule:
        """The schedule for a budget: the path's; on other costs than MACs one allocated anew.

        The path was walked in MACs. Where bins do not pay, another table is best, which is why it is solved afresh on
        the map's error model around the dense table.

        Args:
            description: of the transformer.
            budget: fraction of the dense run; lower keeps fewer tokens.
            router: whether routers, or a ranking that costs as much, are counted among the MACs.
            costs: cost table of the map's run, for a budget in its unit; None counts MACs.

        Raises:
            BudgetUnreachable: the walk did not go that low, or no table of allowed bins does.
        """
        if costs is None:
            return KeepSchedule(self._within(description, budget, router)[0], self.run, budget)
        try:
            return KeepSchedule.solved(allocate(self.model, costs, budget), costs, budget)
        except BudgetUnreachable as error:
            raise BudgetUnreachable("measured", budget, error.reachable) from None

    def predicted(self, description: Description, budget: float) -> float:
        """Predicted error of the path's schedule for a budget, as it was measured on the way."""
        return self._within(description, budget)[1]

    def _within(self, description: Description, budget: float, router: bool = True) -> tuple[Table, float]:
        try:
            return self.path.within(macs_table(description, self.run, router=router), budget)
        except BudgetUnreachable as error:
            hint = "measure again with a smaller --lowest" if budget < error.reachable[0] else "its bins are too coarse"
            raise BudgetUnreachable("measured", budget, error.reachable, hint) from None

    def error(self, table: Table) -> float | None:
        """Predicted error of any table, from the dense point; None where its regions do not divide the map's.

        Finer tables count by the mean of their regions inside one of the map's.
        """
        own, regions = self.model.regions, len(table[0])
        if own % regions == 0:
            table, regions = tuple(tuple(row[r * regions // own] for r in range(own)) for row in table), own
        if regions % own:
            return None
        finer = regions // own
        parts = [tuple(row[part::finer] for row in table) for part in range(finer)]
        return sum(map(self.model.error, parts)) / finer

    def block_order(self) -> tuple[int, ...]:
        """Blocks in the order in which bypassing them changes least, each given those that are gone."""
        layers, regions = self.model.layers, self.model.regions
        order: list[int] = []
        while len(order) < layers:
            rest = [layer for layer in range(layers) if layer not in order]
            gone = [(*order, layer) for layer in rest]
            errors = [self.model.error([[0 if at in out else 10] * regions for at in range(layers)]) for out in gone]
            order.append(rest[errors.index(min(errors))])
        return tuple(order)

    def require(self, run: SamplingRun | None = None, transformer: nn.Module | None = None) -> Sensitivity:
        """Itself, if it was measured for this run and on these weights (None: not compared).

        Raises:
            DiffratioError: it was not.
        """
        if run is not None and run != self.run:
            own, other = (f"{r.steps} steps, guidance {r.guidance}, {r.grid.tokens} tokens" for r in (self.run, run))
            detail = f"{own}, not for {other}" if own != other else f"{own} at other noise levels"
            raise DiffratioError(f"sensitivity map: it was measured for a run of {detail}; `diffratio measure` again")
        if transformer is not None and (found := weights_digest(transformer)) != self.weights_sha256:
            raise DiffratioError(
                f"sensitivity map: it was measured on weights {self.weights_sha256[:12]} and these are {found[:12]}; "
                "`diffratio measure` them, or give the checkpoint that was measured"
            )
        return self


def save_sensitivity(path: str | FilePath, found: Sensitivity) -> None:
    """Writes a map, whole or not at all.

    Raises:
        DiffratioError: the name does not end in .safetensors.
    """
    from safetensors.torch import save_file

    _named(path)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "base": found.model.base,
        "path": {"cells": found.path.cells, "errors": found.path.errors},
        "run": found.run.to_json(),
        "weights_sha256": found.weights_sha256,
        "ranking": found.ranking,
        "n": found.n,
        "seed": found.seed,
        "unit": found.unit,
    }
    tensors: dict[str, Tensor] = {name: getattr(found.model, name).contiguous() for name in _TENSORS}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"diffratio": json.dumps(header, allow_nan=False)})


def load_sensitivity(path: str | FilePath) -> Sensitivity:
    """Reads a map that `diffratio measure` wrote.

    Raises:
        DiffratioError: no such file, or no map.
    """
    from safetensors import SafetensorError, safe_open

    _named(path)
    if not FilePath(path).is_file():
        raise DiffratioError(
            f"sensitivity map: no file {str(path)!r}; `diffratio measure EXPERIMENT --out FILE` makes one"
        )
    try:
        with safe_open(path, "pt") as file:
            header: Any = parse_json((file.metadata() or {}).get("diffratio", "null"))
            if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
                raise DiffratioError(
                    f"{str(path)!r} holds no sensitivity map of this release; `diffratio measure` again"
                )
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        return _from(header, tensors)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, DiffratioError):
            raise
        raise DiffratioError(
            f"sensitivity map {str(path)!r} is damaged ({type(error).__name__}); measure again"
        ) from None


def find_map(name: str) -> str:
    """A map's file: itself, or that of a checkpoint which ships with one."""
    return shipped_beside(name, MAPS, SUFFIX)


def required_map(name: str, transformer: nn.Module, run: SamplingRun) -> Sensitivity:
    """A map that was measured for a run and on these weights.

    Args:
        name: its file, or a checkpoint that ships with one.
        transformer: dense; on the meta device its weights are not compared with the map's.
        run: the run that a budget counts.

    Raises:
        DiffratioError: no such file, or a map of another run or other weights.
    """
    path = find_map(name)
    found = load_sensitivity(path)
    on_meta = next(transformer.parameters()).is_meta
    try:
        return found.require(run, None if on_meta else transformer)
    except DiffratioError as error:
        raise DiffratioError(f"{path!r}: {error}") from None


def _from(header: dict[str, Any], tensors: dict[str, Tensor]) -> Sensitivity:
    base = tuple(tuple(int(bin_) for bin_ in row) for row in header["base"])
    run = SamplingRun.from_json(header["run"])
    KeepSchedule(base, run)  # its checks
    layers, regions = len(base), len(base[0])
    rows = layers * 11
    shapes = {"gram": (regions, rows, rows), "cross": (regions, rows), "offset": (regions,), "weights": (regions,)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != torch.float64 or not tensors[name].isfinite().all():
            raise ValueError(name)
    cells: Sequence[Sequence[int]] = header["path"]["cells"]
    path = Path(layers, regions, tuple((int(a), int(b)) for a, b in cells), tuple(map(float, header["path"]["errors"])))
    return Sensitivity(
        ErrorModel(base, **tensors),
        path,
        run,
        str(header["weights_sha256"]),
        str(header["ranking"]),
        int(header["n"]),
        int(header["seed"]),
        str(header["unit"]),
    )


def _named(path: str | FilePath) -> None:
    if FilePath(path).suffix != SUFFIX:
        raise DiffratioError(f"sensitivity map {str(path)!r}: give a name that ends in {SUFFIX}")
