"""KID and FD as torchmetrics objects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffratio.errors import DiffratioError
from diffratio.evaluation.metrics import FDLite0, KIDLite0, fd, kid


def normal(n: int, shift: float = 0.0, seed: int = 0, d: int = 16) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


class Given(nn.Module):
    """Stands where torchmetrics puts Inception: images are features already."""

    num_features = 16

    def forward(self, x: Tensor) -> Tensor:
        return x


REAL, FAKE = normal(150, seed=1), normal(150, shift=0.2, seed=2)


def test_kid_agrees_with_torchmetrics_over_one_full_subset() -> None:
    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=150)
    ours = KIDLite0()
    for part in range(0, 150, 40):
        for metric in (theirs, ours):
            metric.update(REAL[part : part + 40], real=True)
            metric.update(FAKE[part : part + 40], real=False)
    assert float(ours.compute()) == pytest.approx(1000 * float(theirs.compute()[0]), rel=1e-6)
    assert ours.estimate() == kid(REAL, FAKE)


@pytest.mark.parametrize("n", [60, 150])
def test_fd_agrees_with_torchmetrics(n: int) -> None:
    theirs = FrechetInceptionDistance(feature=Given())
    theirs.set_dtype(torch.float64)
    ours = FDLite0()
    for metric in (theirs, ours):
        metric.update(REAL, real=True)
        metric.update(FAKE[:n], real=False)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert float(ours.compute()) == fd(REAL, FAKE[:n]).value


def test_a_reference_takes_the_place_of_real_updates() -> None:
    metric = KIDLite0(reference=REAL)
    metric.update(FAKE)
    assert float(metric.compute()) == kid(REAL, FAKE).value
    with pytest.raises(DiffratioError, match="has a reference already"):
        metric.update(REAL, real=True)
    assert metric.state_dict() == {}


def test_reset_forgets_samples_and_keeps_real_ones_if_asked() -> None:
    for reset_real, kept in ((True, 0), (False, 1)):
        metric = KIDLite0(reset_real=reset_real)
        metric.update(REAL, real=True)
        metric.update(normal(150, shift=3.0, seed=5))
        before = float(metric.compute())
        metric.reset()
        assert len(metric.real) == kept and not metric.fake
        if not reset_real:
            metric.update(FAKE)
            assert float(metric.compute()) == kid(REAL, FAKE).value != before


def test_images_go_through_the_extractor() -> None:
    class Mean:
        id = "mean"

        def extract(self, images: Tensor, batch_size: int = 64) -> Tensor:
            return images.mean(dim=(2, 3))

    images = torch.rand(8, 3, 4, 4) * 2 - 1
    metric = FDLite0(Mean())
    metric.update(images[:5])
    metric.update(images[5:])
    metric.update(-images, real=True)
    expected = fd(-images.mean(dim=(2, 3)), images.mean(dim=(2, 3))).value
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)


def test_ranks_gather_their_samples_but_not_the_reference() -> None:
    """What torchmetrics does in a group of two, with the other rank's states handed over."""
    halves = [FAKE[:70], FAKE[70:]]
    other = KIDLite0(reference=REAL)
    other.update(halves[1])

    def gather(mine: Tensor, group: object = None) -> list[Tensor]:
        # empty list states are gathered as empty tensors
        return [mine, torch.cat(other.fake) if len(mine) else mine]

    metric = KIDLite0(reference=REAL, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(halves[0])
    assert float(metric.compute()) == pytest.approx(kid(REAL, FAKE).value, rel=1e-12)
    assert sum(map(len, metric.fake)) == 70  # its own again, after the gather


def test_it_copies_and_pickles() -> None:
    metric = KIDLite0(reference=REAL)
    metric.update(FAKE)
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert float(copied.compute()) == float(metric.compute())


@pytest.mark.parametrize("kind", [KIDLite0, FDLite0])
def test_too_few_samples_and_odd_shapes_are_refused(kind: type) -> None:
    name = {"KIDLite0": "kid_lite0 needs at least 4", "FDLite0": "fd_lite0 needs at least 2"}[kind.__name__]
    metric = kind()
    metric.update(REAL, real=True)
    metric.update(FAKE[:1])
    with pytest.raises(DiffratioError, match=f"{name} fake samples before compute, got 1"):
        metric.compute()
    with pytest.raises(DiffratioError, match="images .* or features"):
        metric.update(torch.zeros(3))
    with pytest.raises(DiffratioError, match=r"reference must be features \(m, d\)"):
        kind(reference=torch.zeros(3))
