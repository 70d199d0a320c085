"""One set of weights, and a count of what is really computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.utils

from diffratio import surgery
from diffratio.backbones import backbone_of
from diffratio.bench.models import compile_blocks_, counted_macs, shared_copy, shortened, wide_dit
from diffratio.cost.run import uniform_run
from diffratio.methods.mod import MoD
from diffratio.methods.tome import ToMe
from diffratio.routing.schedule import KeepSchedule, constant_table


@pytest.fixture
def transformer() -> Any:
    return wide_dit(32, 3, 64, "cpu", torch.float32)


def inputs(batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.full((batch,), 500.0),
        "class_labels": torch.arange(batch),
    }


@torch.no_grad()
def test_a_shared_copy_has_modules_of_its_own_on_the_same_weights(transformer: Any) -> None:
    copy = shared_copy(transformer)
    for one, other in zip(transformer.parameters(), copy.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    surgery.apply_(copy, ToMe(ratio=0.5))
    assert surgery.is_applied(copy) and not surgery.is_applied(transformer)
    before = transformer(**inputs())[0]
    transformer.proj_out_2.bias += 1
    assert torch.equal(surgery.remove_(copy)(**inputs())[0], transformer(**inputs())[0])
    assert not torch.equal(before, transformer(**inputs())[0])


@torch.no_grad()
def test_a_shortened_model_runs_its_blocks_on_the_first_tokens(transformer: Any) -> None:
    seen: list[int] = []
    short = shortened(transformer, 20)
    for block in list(short.transformer_blocks)[1:-1]:
        block.attn1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    arguments = inputs()
    output = short(**arguments)[0]
    assert seen == [20, 20, 20] and output.shape == arguments["hidden_states"].shape
    x = transformer.pos_embed(arguments["hidden_states"])[:, :20]
    for block in backbone_of(transformer).blocks(transformer):
        x = block(x, timestep=arguments["timestep"], class_labels=arguments["class_labels"])
    inner: list[torch.Tensor] = []
    short.transformer_blocks[-1].register_forward_hook(lambda module, args, out: inner.append(out))
    short(**arguments)
    assert torch.allclose(inner[0][:, :20], x, atol=1e-6) and not inner[0][:, 20:].any()


@torch.no_grad()
@pytest.mark.slow
def test_compiled_models_compute_the_same(transformer: Any) -> None:
    torch.compiler.reset()
    arguments, run = inputs(), uniform_run(1, backbone_of(transformer).grid(transformer), "none")
    routed = surgery.apply_(shared_copy(transformer), MoD(KeepSchedule(constant_table(3, 1, 5), run)))
    for model in (shared_copy(transformer), routed):
        expected = model(**arguments)[0]
        counters = torch._dynamo.utils.counters
        counters.clear()
        compiled = compile_blocks_(model, backend="eager")
        assert torch.allclose(compiled(**arguments)[0], expected, atol=1e-6)
        assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_the_count_is_the_analytic_cost(transformer: Any, batch: int) -> None:
    description = surgery.describe(transformer)
    run = uniform_run(2, backbone_of(transformer).grid(transformer), "none")

    def twice(model: Any) -> Any:
        return lambda: [model(**inputs(batch)) for _ in range(2)]

    assert counted_macs(transformer, description, run, batch, twice(transformer)) == 1.0
    for config in (ToMe(ratio=0.5), MoD(KeepSchedule(constant_table(3, 1, 5), run))):
        model = surgery.apply_(shared_copy(transformer), config)
        cost = surgery.macs(model, run=run)
        assert counted_macs(model, description, run, batch, twice(model)) == pytest.approx(
            (cost.total - cost.planning) / cost.dense, abs=1e-12
        )
    assert not any(module._forward_pre_hooks for module in transformer.modules())
