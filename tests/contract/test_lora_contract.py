"""LoRA on a converted model: every backbone, the methods that it is trained with."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contract_table import BACKBONES, ROWS, Row, applied, forward, train_
from torch import nn

import diffratio
from diffratio.surgery import adapter_layers, add_lora_, merged_state

pytest.importorskip("peft")
NAMES = ("dense", "mod", "measured", "diffcr schedule", "diffcr learning", "diffcr learning, soft")
CASES = [(row, backbone) for row in ROWS for backbone in BACKBONES if row.name in NAMES]
each_case = pytest.mark.parametrize(
    ("row", "backbone"), CASES, ids=[f"{row.name}-{name}".replace(" ", "_") for row, name in CASES]
)


def adapted(row: Row, backbone: str) -> nn.Module:
    """With updates that are not 0."""
    transformer: nn.Module = add_lora_(applied(row, backbone), diffratio.LoraSettings(rank=2))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return transformer


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_at_first_nothing_changes(row: Row, backbone: str, training: bool) -> None:
    plain = train_(applied(row, backbone), training)
    transformer = train_(add_lora_(applied(row, backbone)), training)
    assert torch.equal(forward(transformer), forward(plain))


@each_case
def test_gradient_reaches_updates_routers_and_ratios_alone(row: Row, backbone: str) -> None:
    transformer = train_(adapted(row, backbone))
    forward(transformer).square().sum().backward()
    got = {name for name, one in transformer.named_parameters() if one.grad is not None}
    assert got == {name for name, one in transformer.named_parameters() if one.requires_grad}
    updates = {f"{name}.lora_{part}.default.weight" for name in adapter_layers(transformer) for part in "AB"}
    routing = {name for name in got if ".router." in name or name.startswith("keep_ratios")}
    assert got == updates | routing and updates
    assert bool(routing) == row.trains and ("keep_ratios.rho" in routing) == row.ratios
    gradients = {name: one.grad for name, one in transformer.named_parameters() if one.grad is not None}
    transformer.zero_grad()
    transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    forward(transformer).square().sum().backward()
    for name, one in transformer.named_parameters():
        if name in gradients:
            torch.testing.assert_close(one.grad, gradients[name], atol=1e-5, rtol=1e-4)


@each_case
def test_copies_pickles_and_merges(row: Row, backbone: str) -> None:
    transformer = adapted(row, backbone)
    expected = forward(transformer)
    assert not torch.allclose(expected, forward(applied(row, backbone)), atol=1e-4)
    twin = copy.deepcopy(transformer)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.zero_()
    assert torch.equal(forward(twin), expected)
    assert torch.equal(forward(pickle.loads(pickle.dumps(twin))), expected)
    plain = applied(row, backbone)
    plain.load_state_dict(merged_state(twin))
    torch.testing.assert_close(forward(plain), expected, atol=1e-4, rtol=1e-4)
