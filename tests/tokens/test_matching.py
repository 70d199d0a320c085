"""Matching against the release of ToMe."""

from __future__ import annotations

import pytest
import tomesd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffratio.tokens.grid import TokenGrid
from diffratio.tokens.matching import (
    bipartite_merge,
    cell_destinations,
    cell_members,
    complement,
    foremost,
    nearest_partners,
    window_similarity,
)


def _theirs(x: torch.Tensor, grid: TokenGrid, removed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged tokens, sorted by content since the release orders them otherwise, and tokens copied back."""
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        x, grid.width, grid.height, 2, 2, removed, no_rand=True
    )
    merged = merge(x)
    return merged, unmerge(merged)


def _compare(grid: TokenGrid, removed: int, seed: int) -> None:
    x = torch.randn(2, grid.tokens, 16, generator=torch.Generator().manual_seed(seed))
    plan = bipartite_merge(x, *cell_destinations(grid, 2, None), removed)
    merged, unmerged = _theirs(x, grid, removed)
    ours = plan.reduce(x)
    assert ours.shape == merged.shape
    torch.testing.assert_close(plan.restore(ours, x), unmerged, atol=1e-6, rtol=1e-5)
    for mine, other in zip(ours, merged, strict=True):
        # every group of theirs is one of ours, and the other way round
        distance = torch.cdist(mine, other, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(0).values.max() < 1e-5
        assert distance.min(1).values.max() < 1e-5
        assert sorted(distance.argmin(1).tolist()) == list(range(len(mine)))


@pytest.mark.parametrize("sides", [(4, 4), (8, 8), (6, 10), (5, 5), (7, 4), (4, 7), (9, 3)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_agrees_with_the_release(sides: tuple[int, int], share: float) -> None:
    grid = TokenGrid(*sides)
    sources = grid.tokens - (sides[0] // 2) * (sides[1] // 2)
    _compare(grid, max(1, int(share * sources)), seed=11)


@settings(max_examples=40)
@given(st.integers(2, 7), st.integers(2, 7), st.floats(0, 1), st.integers(0, 10_000))
def test_agrees_with_the_release_anywhere(height: int, width: int, share: float, seed: int) -> None:
    grid = TokenGrid(height, width)
    sources = grid.tokens - (height // 2) * (width // 2)
    _compare(grid, max(1, int(share * sources)), seed)


def test_merges_the_most_similar_first() -> None:
    """2x2 grid, destination 0; token 2 points the same way, 1 at a right angle, 3 away."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [-1.0, 0.0]]])
    split = cell_destinations(TokenGrid(2, 2), 2, None)
    assert bipartite_merge(x, *split, 1).slots.tolist() == [[0, 1, 0, 2]]
    assert bipartite_merge(x, *split, 2).slots.tolist() == [[0, 0, 0, 1]]
    assert bipartite_merge(x, *split, 3).slots.tolist() == [[0, 0, 0, 0]]


def test_autocast_does_not_coarsen_the_comparison() -> None:
    x = torch.randn(2, 64, 16)
    split = cell_destinations(TokenGrid(8, 8), 2, None)
    expected = bipartite_merge(x, *split, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = bipartite_merge(x, *split, 24)
    assert torch.equal(plan.slots, expected.slots)


def test_values_do_not_depend_on_scale_or_batch() -> None:
    x = torch.randn(3, 25, 8)
    split = cell_destinations(TokenGrid(5, 5), 2, None)
    whole = bipartite_merge(x, *split, 10)
    assert torch.equal(bipartite_merge(4 * x, *split, 10).slots, whole.slots)
    assert torch.equal(bipartite_merge(x[1:2], *split, 10).slots, whole.slots[1:2])


@settings(max_examples=30)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(2, 3), st.booleans(), st.integers(0, 1000))
def test_window_similarity_is_the_mean_cosine_of_pairs(
    height: int, width: int, side: int, self_pairs: bool, seed: int
) -> None:
    grid = TokenGrid(height, width)
    x = torch.randn(2, grid.tokens, 5, generator=torch.Generator().manual_seed(seed)).double()
    members = cell_members(grid, side)
    assert len(members) == (height // side) * (width // side)
    got = window_similarity(x, grid, side, self_pairs)
    assert got.shape == (2, len(members))
    for b in range(2):
        for w, window in enumerate(members.tolist()):
            rows, columns = {n // width // side for n in window}, {n % width // side for n in window}
            assert len(rows) == len(columns) == 1 and len(set(window)) == side**2
            cosines = [
                torch.cosine_similarity(x[b, n], x[b, m], dim=0) for n in window for m in window if self_pairs or n != m
            ]
            assert float(got[b, w]) == pytest.approx(float(sum(cosines)) / len(cosines), abs=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0.1, 1), st.integers(0, 1000))
def test_nearest_partners_by_hand(height: int, width: int, share: float, seed: int) -> None:
    grid = TokenGrid(height, width)
    order = torch.rand(2, grid.tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    destinations = order[:, : max(1, int(share * grid.tokens))].sort(1).values
    sources = complement(destinations, grid.tokens)
    best, partner = nearest_partners(grid, sources, destinations)
    for b in range(2):
        assert sorted(sources[b].tolist() + destinations[b].tolist()) == list(range(grid.tokens))
        for s, n in enumerate(sources[b].tolist()):
            squared = [(n // width - m // width) ** 2 + (n % width - m % width) ** 2 for m in destinations[b].tolist()]
            assert -int(best[b, s]) == min(squared)
            assert int(partner[b, s]) == squared.index(min(squared))


def test_foremost_takes_the_first_before_the_best() -> None:
    scores = torch.tensor([[0.1, 3.0, 2.0, 2.0, -1e30]])
    first = torch.tensor([[False, False, False, False, True]])
    assert foremost(scores, 3).tolist() == [[1, 2, 3]]
    assert foremost(scores, 3, first).tolist() == [[4, 1, 2]]
