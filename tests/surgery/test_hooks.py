"""Offloading, layerwise casting and quantisation around routed transformers, before and after the method goes in."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.errors import DiffratioError
from diffratio.surgery import attachment

CPU = torch.device("cpu")
FAMILIES = ("dit", "pixart", "sd3", "flux")


def by_blocks(model: Any) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def by_leaves(model: Any) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def sequentially(model: Any) -> None:
    """As `enable_sequential_cpu_offload`: weights lie elsewhere and come for one module at a time."""
    accelerate.cpu_offload(model, CPU, offload_buffers=True)


def as_a_whole(model: Any) -> None:
    """As `enable_model_cpu_offload`."""
    accelerate.cpu_offload_with_hook(model, CPU)


OFFLOADS: tuple[Callable[[Any], None], ...] = (by_blocks, by_leaves, sequentially, as_a_whole)


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    changes = {"num_layers": 2} if family != "flux" else {}
    return get_backbone(family).tiny(**changes).eval()


def fits(family: str, way: Callable[[Any], None]) -> bool:
    """diffusers itself refuses to offload DiT in groups."""
    return not (family == "dit" and way in (by_blocks, by_leaves))


CASES = [(family, way) for family in FAMILIES for way in OFFLOADS if fits(family, way)]


def opinionated(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for block in backbone_of(model).blocks(model):
        with torch.no_grad():
            block.router.weight.copy_(torch.randn(block.router.weight.shape, generator=generator))
    return model


def routed(model: Any) -> Any:
    return opinionated(diffratio.apply_(model, diffratio.MoD(keep=0.5)))


def batch_of(model: Any) -> dict[str, Any]:
    backbone = backbone_of(model)
    timestep = backbone.timestep(torch.tensor([0.9, 0.3]))
    return {**backbone.example(model, 2, seed=3), "timestep": timestep}


def predict(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**batch, return_dict=False)[0]
    assert isinstance(output, Tensor)
    return output


def kept(model: Any, batch: dict[str, Any]) -> tuple[Tensor, list[set[tuple[int, int]]]]:
    """Prediction, and the tokens that each block computed, (sample, token)."""
    method: Any = attachment(model).token_method
    method.kept_index = []
    output = predict(model, batch)
    found = [
        {(row, int(one)) for row, own in enumerate(part) for one in own}
        for part in method.kept_index
        if part is not None
    ]
    method.kept_index = None
    return output, found


@pytest.mark.parametrize(("family", "way"), CASES)
def test_offloading_a_routed_model_changes_nothing(family: str, way: Callable[[Any], None]) -> None:
    model = routed(tiny(family))
    batch = batch_of(model)
    expected, tokens = kept(model, batch)
    way(model)
    found, again = kept(model, batch)
    assert torch.equal(found, expected) and again == tokens
    assert len(tokens) == len(backbone_of(model).blocks(model))


@pytest.mark.parametrize(("family", "way"), CASES)
def test_a_method_reaches_a_model_that_is_offloaded_already(family: str, way: Callable[[Any], None]) -> None:
    """Hooks hide a class's forward: without care the method would be a silent no-op."""
    model = tiny(family)
    batch = batch_of(model)
    dense = predict(model, batch)
    config = diffratio.ToMe(ratio=0.5)
    expected = predict(diffratio.apply_(copy.deepcopy(model), config), batch)
    assert not torch.equal(expected, dense)
    way(model)
    diffratio.apply_(model, config)
    assert torch.equal(predict(model, batch), expected)
    assert torch.equal(predict(diffratio.remove_(model), batch), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_follow_a_model_that_is_moved_as_a_whole_and_no_other(family: str) -> None:
    model = tiny(family)
    batch = batch_of(model)
    dense = predict(model, batch)
    expected, tokens = kept(routed(copy.deepcopy(model)), batch)
    for way in OFFLOADS:
        if not fits(family, way):
            continue
        offloaded = copy.deepcopy(model)
        way(offloaded)
        if way is as_a_whole:
            found, again = kept(routed(offloaded), batch)
            assert torch.equal(found, expected) and again == tokens
            continue
        with pytest.raises(DiffratioError, match="offloaded or dispatched by hooks.*apply_ first") as caught:
            routed(offloaded)
        assert "\n" not in str(caught.value)
        assert torch.equal(predict(offloaded, batch), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_is_removed_from_under_the_hooks(family: str) -> None:
    model = tiny(family)
    batch = batch_of(model)
    dense = predict(model, batch)
    routed(model)
    as_a_whole(model)
    assert not torch.equal(predict(model, batch), dense)
    diffratio.remove_(model)
    assert torch.equal(predict(model, batch), dense)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # leaves the forward on the object
    assert not torch.equal(predict(diffratio.apply_(model, diffratio.ToMe(ratio=0.5)), batch), dense)


def near(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def agreement(found: list[set[tuple[int, int]]], expected: list[set[tuple[int, int]]]) -> float:
    """Share of the computed tokens that are the same."""
    same = sum(len(a & b) for a, b in zip(found, expected, strict=True))
    return same / sum(map(len, expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stored", "first"), [(torch.bfloat16, False), (torch.float8_e4m3fn, True)])
def test_weights_stored_in_fewer_bits_keep_nearly_the_same_tokens(
    family: str, stored: torch.dtype, first: bool
) -> None:
    model = tiny(family)
    batch = batch_of(model)
    expected, tokens = kept(routed(copy.deepcopy(model)), batch)
    if first:
        model.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    routed(model)
    if not first:
        model.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    found, again = kept(model, batch)
    assert any(parameter.dtype == stored for parameter in model.parameters())
    assert all(block.router.weight.dtype == torch.float32 for block in backbone_of(model).blocks(model))
    coarse = stored == torch.float8_e4m3fn
    assert near(found, expected) < (0.2 if coarse else 0.03) and agreement(again, tokens) >= (0.8 if coarse else 0.95)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_by_torchao_keep_nearly_the_same_tokens(family: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = routed(tiny(family))
    batch = batch_of(model)
    expected, tokens = kept(model, batch)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    found, again = kept(model, batch)
    routers = [block.router.weight for block in backbone_of(model).blocks(model)]
    assert all(type(weight) is nn.Parameter for weight in routers)
    assert near(found, expected) < 0.05 and agreement(again, tokens) >= 0.95 and not torch.equal(found, expected)


def test_a_forward_of_its_own_is_refused_and_nothing_is_swapped() -> None:
    model = tiny("dit")
    block = model.transformer_blocks[1]
    own = block.forward
    block.forward = types.MethodType(lambda self, *args, **kwargs: own(*args, **kwargs), block)
    with pytest.raises(DiffratioError, match="BasicTransformerBlock has a forward of its own"):
        diffratio.apply_(model, diffratio.ToMe(ratio=0.5))
    assert not any("_diffratio" in vars(module) for module in model.modules())
