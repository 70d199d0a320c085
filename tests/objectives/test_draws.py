"""Where the training noise levels of a batch lie, and what they depend on."""

from __future__ import annotations

import pytest
import torch

from diffratio.cost.run import regions_of
from diffratio.errors import DiffratioError
from diffratio.objectives import FlowMatching, NoisePrediction, Objective, noise_levels, sample_draws

OBJECTIVES = [FlowMatching(), FlowMatching(levels="uniform"), NoisePrediction()]
IDS = ["logit_normal", "uniform", "noise"]


def levels_of(objective: Objective, batch: int, index: int, timesteps: str, regions: int = 4) -> torch.Tensor:
    positions = range(index * batch, (index + 1) * batch)
    uniform, _ = sample_draws(0, positions, (1, 1, 1))
    return noise_levels(objective, uniform, positions, batch, timesteps, regions)


def test_draws_depend_on_seed_and_position_alone() -> None:
    uniform, noise = sample_draws(7, range(10), (1, 4, 4))
    for order in ([9, 3, 0], [4], list(range(9, -1, -1))):
        some, images = sample_draws(7, order, (1, 4, 4))
        assert torch.equal(some, uniform[order]) and torch.equal(images, noise[order])
    other, images = sample_draws(8, range(10), (1, 4, 4))
    assert not (other == uniform).any() and not (images == noise).any()
    assert len(set(uniform.tolist())) == 10


def test_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    sample_draws(0, range(4), (1, 2, 2))
    assert torch.equal(torch.rand(2), expected)


def test_draws_have_their_distributions() -> None:
    uniform, noise = sample_draws(1, range(2000), (1, 4, 4))
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert abs(float(uniform.mean()) - 0.5) < 0.03 and abs(float(uniform.var()) - 1 / 12) < 0.01
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("regions", [1, 4, 5])
def test_stratified_gives_each_region_its_share(objective: Objective, regions: int) -> None:
    """In every batch of B, what lies below each edge is B times its cumulative density, rounded up or down."""
    batch = 40
    for index in range(5):
        found = regions_of(levels_of(objective, batch, index, "stratified", regions), regions)
        for region in range(1, regions + 1):
            below = int((found < region).sum())
            assert abs(below - batch * objective.cumulative(region / regions)) < 1
        assert (found.bincount(minlength=regions) > 0).all()


def test_stratified_shares_are_exact_where_they_are_whole() -> None:
    for objective in OBJECTIVES[1:]:
        for index in range(10):
            counts = regions_of(levels_of(objective, 12, index, "stratified"), 4).bincount(minlength=4)
            assert counts.tolist() == [3, 3, 3, 3]


def test_stratified_levels_differ_from_batch_to_batch() -> None:
    first, second = (levels_of(FlowMatching(), 8, index, "stratified") for index in (0, 1))
    assert not (first == second).any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("regions", [1, 4, 5])
def test_one_region_a_batch_follows_the_density(objective: Objective, regions: int) -> None:
    batches, counts = 400, [0] * regions
    for index in range(batches):
        found = set(regions_of(levels_of(objective, 4, index, "one_region", regions), regions).tolist())
        assert len(found) == 1
        counts[found.pop()] += 1
    for region, count in enumerate(counts):
        share = objective.cumulative((region + 1) / regions) - objective.cumulative(region / regions)
        assert count / batches == pytest.approx(share, abs=0.01)


def test_one_region_levels_fill_the_region() -> None:
    levels = torch.cat([levels_of(FlowMatching("uniform"), 50, index, "one_region") for index in range(40)])
    counts = torch.histc(levels, 20, 0, 1)
    assert (counts > 40).all() and (counts < 180).all()  # 100 on average


def test_iid_is_the_density_and_knows_no_batch() -> None:
    objective = FlowMatching()
    positions = range(4000)
    uniform, _ = sample_draws(0, positions, (1, 1, 1))
    levels = noise_levels(objective, uniform, positions, 4000, "iid", 4)
    assert torch.equal(levels, noise_levels(objective, uniform, positions, 8, "iid", 1))
    assert torch.equal(levels[17:20], noise_levels(objective, uniform[17:20], range(17, 20), 3, "iid", 4))
    for u in (0.25, 0.5, 0.8):
        assert float((levels < u).float().mean()) == pytest.approx(objective.cumulative(u), abs=0.025)


@pytest.mark.parametrize("timesteps", ["iid", "stratified", "one_region"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_two_processes_take_their_parts_of_one_batch(objective: Objective, timesteps: str) -> None:
    """Rank r of two takes half of the global batch: levels are those of the whole batch."""
    whole = levels_of(objective, 12, 3, timesteps)
    uniform, _ = sample_draws(0, range(36, 48), (1, 1, 1))
    halves = [
        noise_levels(objective, uniform[part], range(36, 48)[part], 12, timesteps, 4)
        for part in (slice(0, 6), slice(6, 12))
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_levels_stay_inside_for_extreme_draws() -> None:
    for objective in OBJECTIVES:
        levels = noise_levels(objective, torch.tensor([0.0, 1 - 1e-7]), [0, 1], 2, "iid", 4)
        assert torch.isfinite(levels).all() and (levels >= 0).all() and (levels <= 1).all()


def test_unknown_timesteps() -> None:
    with pytest.raises(DiffratioError, match="objective.timesteps 'stratify': did you mean stratified"):
        noise_levels(FlowMatching(), torch.rand(2), [0, 1], 2, "stratify", 4)
