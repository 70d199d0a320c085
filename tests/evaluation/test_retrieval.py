"""caption_retrieval on features that are made to obey their captions, or not to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.evidence import Evidence, Sentences
from diffratio.evaluation.metrics import measure
from diffratio.evaluation.metrics.retrieval import caption_retrieval

WIDTH, TEXT = 24, 8


def world(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures whose features are a linear function of their captions' embeddings, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.nn.functional.normalize(torch.randn(n, TEXT, generator=generator), dim=1)
    mixing = torch.randn(TEXT, WIDTH, generator=torch.Generator().manual_seed(99))
    return texts @ mixing + 0.05 * torch.randn(n, WIDTH, generator=generator), texts


def test_obedient_samples_are_found_and_shuffled_ones_are_not() -> None:
    (train, of_train), (real, of_real), (made, of_made) = world(300, 0), world(120, 1), world(60, 2)
    good = caption_retrieval(made, of_made, real, of_real, train, of_train)
    assert good.value > 0.95 and good.real > 0.95 and good.n == 60
    assert (good.pool, good.top, good.chance) == (100, 10, 0.1)
    bad = caption_retrieval(made, of_made.roll(1, 0), real, of_real, train, of_train)
    assert bad.value < 0.35 and bad.low <= bad.value <= bad.high


def test_a_small_pool_keeps_the_chance() -> None:
    (train, of_train), (real, of_real) = world(40, 0), world(20, 1)
    found = caption_retrieval(real, of_real, real, of_real, train, of_train)
    assert found.pool == 20 and found.top == 2 and found.chance == pytest.approx(0.1)
    assert found.value == found.real


def test_captions_must_be_as_many_as_pictures() -> None:
    train, of_train = world(40, 0)
    with pytest.raises(DiffratioError, match="39 for 40"):
        caption_retrieval(train, of_train, train, of_train[1:], train, of_train)


def test_the_table_measures_it_where_there_are_captions() -> None:
    (train, of_train), (real, of_real), (made, of_made) = world(60, 0), world(30, 1), world(20, 2)
    texts = Sentences(of_made, of_real, of_train)
    evidence = Evidence(torch.zeros(20, 3, 8, 8), made, real, train=lambda: train, sentences=texts)
    assert measure(["caption_retrieval"], evidence)["caption_retrieval"]["value"] > 0.9
    assert measure(["caption_retrieval"], dataclasses.replace(evidence, sentences=None)) == {}
