"""The command on a card composes the settings of its run again."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from diffratio.errors import DiffratioError
from diffratio.training import reproduce
from diffratio.training.reproduce import command
from diffratio.training.run import compose, plain_config

WORDS = [
    [],
    ["experiment=emoji_pretrain", "optimizer.schedule=constant", "trainer.max_steps=4218"],
    ["experiment=emoji_diffcr", "method=hand", "seed=3"],
    ["experiment=emoji_inpaint", "inpaint.share=[0.2,0.3]", "optimizer.betas=[0.8,0.9]"],
    ["data=folder", "data.source='/a b/it\\'s, [c]'", "backbone=pixart_small", "lora=default", "lora.rank=3"],
    ["backbone=dit_fashion", "+backbone.config.dropout=0.1", "method=diffcr", "method.regions=2", "data.flip=false"],
    ["experiment=fashion_mod", "objective.distill=1e-3", "data.num_classes=null", "data.train_split='null'"],
]


def plain_of(words: list[str]) -> dict[str, Any]:
    plain = plain_config(compose("train", words))
    return {key: value for key, value in plain.items() if key not in ("paths", "logger", "name")}


@pytest.mark.parametrize("words", WORDS, ids=[" ".join(words)[:30] or "plain" for words in WORDS])
def test_it_composes_the_same_settings(words: list[str]) -> None:
    plain = plain_config(compose("train", words))
    said = shlex.split(command(plain))
    assert said[:2] == ["diffratio", "train"] and plain_of(said[2:]) == plain_of(words)


def test_it_is_short_and_leaves_out_where_and_how_it_ran() -> None:
    words = ["experiment=fashion_mod", "trainer.devices=2", "paths.output_dir=/x", "logger=wandb", "ckpt_path=last"]
    plain = plain_config(compose("train", [*words, "callbacks.pictures_every=7"]))
    assert command(plain) == "diffratio train experiment=fashion_mod seed=0"
    assert command(plain, steps=3) == "diffratio train experiment=fashion_mod seed=0 trainer.max_steps=3"
    assert command(plain, steps=10**6) == command(plain)


def test_settings_that_no_longer_compose_do_not_end_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_config(compose("train", ["experiment=fashion_mod"]))

    def gone(*_: Any) -> Any:
        raise DiffratioError("no such config")

    monkeypatch.setattr(reproduce, "compose", gone)
    assert command(plain) == "diffratio train experiment=fashion_mod seed=0"
