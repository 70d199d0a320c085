"""Maps: resumed forwards, predictions on networks where they are exact, files, calibrated methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cost_tables import STEP_BINS, latency_table
from torch import Tensor, nn

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.macs import macs_table
from diffratio.cost.run import uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.objectives import get_objective
from diffratio.routing.allocate import allocate
from diffratio.routing.schedule import KeepSchedule, Table, constant_table
from diffratio.sensitivity import MeasureSettings, Sensitivity, load_sensitivity, measure_sensitivity, save_sensitivity
from diffratio.sensitivity.gram import below, measure_gram, true_errors
from diffratio.sensitivity.importance import region_weights
from diffratio.sensitivity.measure import region_batches
from diffratio.sensitivity.probe import Batch, probed
from diffratio.sensitivity.store import weights_digest
from diffratio.surgery import describe, is_applied
from diffratio.tokens.grid import TokenGrid

GRID = TokenGrid(4, 4)
RUN = uniform_run(8, GRID)
SETTINGS = MeasureSettings(n=8, regions=2, lowest=0.7, step=0.15, samples=2, batch_size=4)


def transformer_of(seed: int = 0, layers: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    transformer: nn.Module = get_backbone("dit").tiny(num_layers=layers)
    return transformer


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(n) % 10


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return measure_sensitivity(transformer_of(), *images(), get_objective("flow"), RUN, SETTINGS)


class Additive:
    """A linear network in float64 whose blocks each add their own part of the output: kept channels by bin."""

    def __init__(self, layers: int, width: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(layers, width, 20, generator=generator, dtype=torch.float64)
        self.batch: Batch | None = None
        self.column: list[int] = []

    @property
    def layers(self) -> int:
        return len(self.weights)

    def trace(self, batch: Batch, bins: Sequence[int]) -> Tensor:
        self.batch, self.column = batch, list(bins)
        return self._output(self.column)

    def resume(self, layer: int, bin_: int) -> Tensor:
        return self._output([*self.column[:layer], bin_, *self.column[layer + 1 :]])

    def _output(self, bins: Sequence[int]) -> Tensor:
        assert self.batch is not None
        parts = [weight[:, : 2 * bin_].sum(1) for weight, bin_ in zip(self.weights, bins, strict=True)]
        return self.batch.inputs * sum(parts)


def toy_batches(width: int) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(9)
    draws = torch.randn(2, 2, 3, width, generator=generator, dtype=torch.float64)
    return [[Batch(x, torch.zeros(3), {}) for x in part] for part in draws]


@pytest.mark.parametrize("base", [((10, 10),) * 4, ((7, 10), (9, 2), (10, 5), (4, 8))])
def test_a_linear_network_is_predicted_exactly(base: Table) -> None:
    """Also away from the dense table, where e0 must not be forgotten."""
    network, batches = Additive(4, 5), toy_batches(5)
    model = measure_gram(network, batches, base, (1.0, 0.5))
    for table in (base, ((0, 0),) * 4, ((3, 10), (9, 1), (6, 5), (4, 0))):
        below_base = tuple(tuple(map(min, row, top)) for row, top in zip(table, base, strict=True))
        errors = true_errors(network, batches, below_base)
        torch.testing.assert_close(
            model.region_errors(below_base), torch.tensor(errors, dtype=torch.float64), atol=1e-10, rtol=1e-10
        )
        assert model.error(below_base) == pytest.approx(errors[0] + 0.5 * errors[1], abs=1e-10)


def test_bins_that_were_not_measured_are_interpolated() -> None:
    """Each bin of this network adds the same, so that interpolation is exact."""
    network, batches = Additive(3, 5), toy_batches(5)
    network.weights = network.weights[..., :1].expand(-1, -1, 20)
    base = ((10, 6), (9, 10), (3, 0))
    model = measure_gram(network, batches, base, (1.0, 1.0), (1, 4))
    assert below(9, (1, 4)) == (8, 5, 0) and below(0, (1,)) == () and below(3) == (2, 1, 0)
    table = ((7, 2), (6, 3), (1, 0))
    torch.testing.assert_close(
        model.region_errors(table),
        torch.tensor(true_errors(network, batches, table), dtype=torch.float64),
        atol=1e-10,
        rtol=1e-10,
    )


def test_a_planted_useless_block_goes_first() -> None:
    transformer = transformer_of()
    block = transformer.transformer_blocks[1]  # type: ignore[index,union-attr]
    with torch.no_grad():  # its two gates are closed: it adds nothing
        block.norm1.linear.weight.view(6, -1, block.norm1.linear.weight.shape[1])[[2, 5]] = 0  # type: ignore[union-attr]
        block.norm1.linear.bias.view(6, -1)[[2, 5]] = 0  # type: ignore[union-attr]
    found = measure_sensitivity(transformer, *images(), get_objective("flow"), RUN, replace(SETTINGS, samples=0))
    assert found.block_order()[0] == 1
    # nearly all that the block costs goes before anything else
    assert {layer for layer, _ in found.path.cells[:19]} == {1}
    assert found.path.errors[18] == 0 < found.path.errors[-1]


@pytest.mark.parametrize("ranking", ["strided", "deviation", "random"])
def test_a_resumed_forward_is_the_forward_of_that_table(ranking: str) -> None:
    """Compared with the method itself, applied with the changed table."""
    transformer = transformer_of()
    (batches, _) = region_batches(transformer, get_objective("flow"), *images(), 2, 4, 0)
    base, batch = (9, 6, 10), batches[0]
    with probed(transformer, ranking) as network:
        network.trace(batch, base)
        changed = {(layer, bin_): network.resume(layer, bin_) for layer in range(3) for bin_ in (0, 4, 10)}
    assert not is_applied(transformer) and transformer.training
    transformer.eval()
    for (layer, bin_), output in changed.items():
        table = tuple((bin_ if at == layer else own,) for at, own in enumerate(base))
        diffratio.apply_(transformer, diffratio.Measured(KeepSchedule(table, RUN), ranking))
        with torch.no_grad():
            expected = transformer(batch.inputs, batch.timestep, **batch.condition, return_dict=False)[0]
        diffratio.remove_(transformer)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


def test_single_changes_are_predicted_exactly(found: Sensitivity) -> None:
    """With one cell changed nothing is approximated."""
    transformer = transformer_of()
    batches = region_batches(transformer, get_objective("flow"), *images(), 2, 4, 0)
    with probed(transformer, "strided") as network:
        for table in (((10, 10), (10, 3), (10, 10)), ((0, 10), (10, 10), (10, 7))):
            true = torch.tensor(true_errors(network, batches, table), dtype=torch.float64)
            torch.testing.assert_close(found.model.region_errors(table), true, atol=1e-8, rtol=1e-5)


def test_weights_are_distances_of_final_images() -> None:
    transformer = transformer_of()
    objective = get_objective("flow")
    batches = region_batches(transformer, objective, *images(), 2, 4, 0)
    weights = region_weights(transformer, objective, RUN, batches, "strided", samples=3)
    assert all(weight > 0 for weight in weights) and not is_applied(transformer)
    assert region_weights(transformer, objective, RUN, batches, "strided", samples=3) == weights
    late = uniform_run(1, GRID)  # one step, at the noisiest level
    assert region_weights(transformer, objective, late, batches, "strided", samples=0) == (0.0, 1.0)
    assert region_weights(transformer, objective, late, batches, "strided", samples=2)[0] == 0


def test_the_transformer_is_left_as_it_was(found: Sensitivity) -> None:
    transformer = transformer_of()
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    again = measure_sensitivity(transformer, *images(), get_objective("flow"), RUN, SETTINGS)
    assert transformer.training and not is_applied(transformer)
    assert all(torch.equal(value, before[key]) for key, value in transformer.state_dict().items())
    assert again.path == found.path and torch.equal(again.model.gram, found.model.gram)


def test_schedules_meet_their_budget(found: Sensitivity) -> None:
    description = describe(transformer_of())
    costs = macs_table(description, RUN)
    for budget in (0.95, 0.85, 0.75):
        schedule = found.schedule(description, budget)
        assert budget - 0.01 <= costs.fraction(schedule.bins) <= budget and schedule.run == RUN
        assert found.predicted(description, budget) > 0
        best = found.model.error(allocate(found.model, costs, budget))
        assert best <= found.model.error(schedule.bins) + 1e-12 or costs.fraction(schedule.bins) < budget
    with pytest.raises(BudgetUnreachable, match="--lowest"):
        found.schedule(description, 0.3)


def test_schedules_for_milliseconds_use_bins_that_pay(found: Sensitivity) -> None:
    description = describe(transformer_of())
    costs = latency_table(width=description.width).require(description, RUN).costs(RUN)
    for budget in (0.9, 0.6):
        schedule = found.schedule(description, budget, costs=costs)
        assert {bin_ for row in schedule.bins for bin_ in row} <= set(STEP_BINS)
        assert costs.fraction(schedule.bins) <= budget and schedule.unit == "latency"
        assert found.model.error(schedule.bins) == found.model.error(allocate(found.model, costs, budget))
    with pytest.raises(BudgetUnreachable, match="measured cannot reach a budget of 0.01"):
        found.schedule(description, 0.01, costs=costs)


def test_errors_of_finer_and_coarser_tables(found: Sensitivity) -> None:
    table = ((10, 4), (6, 10), (9, 8))
    doubled = tuple(tuple(bin_ for bin_ in row for _ in range(2)) for row in table)
    assert found.error(doubled) == pytest.approx(found.model.error(table))
    assert found.error(((5,), (7,), (10,))) == pytest.approx(found.model.error(((5, 5), (7, 7), (10, 10))))
    assert found.error(((5,) * 3,) * 3) is None
    assert found.error(constant_table(3, 1)) == 0


def test_file_round_trip(found: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    save_sensitivity(path, found)
    again = load_sensitivity(path)
    for name in ("gram", "cross", "offset", "weights"):
        assert torch.equal(getattr(again.model, name), getattr(found.model, name))
    assert again.path == found.path and again.model.base == found.model.base
    assert (again.run, again.weights_sha256, again.ranking, again.n, again.unit) == (
        found.run,
        found.weights_sha256,
        "strided",
        8,
        "macs",
    )


def test_files_that_do_not_fit_are_one_clear_error(found: Sensitivity, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    same = transformer_of()
    assert found.require(RUN, same) is found
    assert found.require(RUN, diffratio.apply_(same, diffratio.MoD(keep=0.5))) is found  # routers are no weights
    with pytest.raises(DiffratioError, match="measured on weights") as other:
        found.require(RUN, transformer_of(seed=1))
    with pytest.raises(DiffratioError, match="8 steps.*not for 4 steps") as run:
        found.require(uniform_run(4, GRID))
    with pytest.raises(DiffratioError, match="no file"):
        load_sensitivity(tmp_path / "none.safetensors")
    with pytest.raises(DiffratioError, match="ends in .safetensors"):
        save_sensitivity(tmp_path / "map.json", found)
    path = tmp_path / "map.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(DiffratioError, match="damaged"):
        load_sensitivity(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(DiffratioError, match="no sensitivity map") as foreign:
        load_sensitivity(path)
    save_sensitivity(path, found)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DiffratioError, match="damaged"):
        load_sensitivity(path)
    assert all("\n" not in str(error.value) for error in (other, run, foreign))


def test_digests_are_of_the_values() -> None:
    assert weights_digest(transformer_of()) == weights_digest(transformer_of().double())
    assert weights_digest(transformer_of()) != weights_digest(transformer_of(seed=1))


def test_calibrate_solves_methods_for_a_budget() -> None:
    transformer = transformer_of()
    batches = [images(4), images(4)]
    settings = replace(SETTINGS, samples=0)
    measured = diffratio.calibrate("measured", transformer, batches, 0.8, steps=8, settings=settings)
    dropped = diffratio.calibrate("block_drop", transformer, batches, 0.6, steps=8, settings=settings)
    assert isinstance(measured, diffratio.Measured) and measured.ranking == "strided"
    assert isinstance(dropped, diffratio.BlockDrop) and len(dropped.blocks) == 1 and not dropped.as_published
    for config, budget in ((measured, 0.8), (dropped, 0.6)):
        fraction = config.method(config, describe(transformer)).macs(RUN).fraction
        assert budget - 0.01 <= fraction <= budget
    with pytest.raises(DiffratioError, match="known are block_drop, measured"):
        diffratio.calibrate("mod", transformer, batches, 0.8)
    with pytest.raises(DiffratioError, match="no batches"):
        diffratio.calibrate("measured", transformer, [], 0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n 0"),
        ({"n": 1}, "without an image"),
        ({"ranking": "router"}, "known are deviation, random, strided"),
        ({"samples": -1}, "samples -1"),
        ({"step": 0.0}, "step 0.0"),
        ({"lowest": 0.0}, "budget 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DiffratioError, match=message):
        replace(SETTINGS, **change)


def test_a_map_is_plain_data(found: Sensitivity) -> None:
    assert json.loads(json.dumps(found.path.cells)) == [list(cell) for cell in found.path.cells]
    assert SETTINGS.targets() == pytest.approx((0.85, 0.7)) and replace(SETTINGS, lowest=1.0).targets() == ()
