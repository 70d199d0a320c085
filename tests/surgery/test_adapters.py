"""LoRA in a transformer: what it reaches, that it changes nothing at first, both orders, and other people's tools."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

import diffratio
from diffratio.backbones import get_backbone
from diffratio.errors import DiffratioError
from diffratio.surgery import LoraSettings, adapter_layers, add_lora_, merge_lora_, merged_state, weights_digest
from diffratio.surgery.adapters import lora_targets

peft = pytest.importorskip("peft")
FAMILIES = ("dit", "pixart")


def tiny(name: str = "dit") -> Any:
    torch.manual_seed(0)
    return get_backbone(name).tiny().eval()


@torch.no_grad()
def output(transformer: nn.Module) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return transformer(x, timestep=torch.tensor([100.0, 900.0]), class_labels=torch.tensor([1, 2])).sample


def trained(transformer: Any) -> Any:
    """LoRA as after a few steps: B is not 0."""
    for name, parameter in sorted(transformer.named_parameters()):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return transformer


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_found_through_the_sites(name: str) -> None:
    transformer, backbone = tiny(name), get_backbone(name)
    default = lora_targets(transformer)
    sites = [path for site, path in backbone.sites.items() if site.endswith(("attention", "feed_forward"))]
    assert {one.split(".")[2] for one in default} == set(sites)
    assert {int(one.split(".")[1]) for one in default} == set(range(len(backbone.blocks(transformer))))
    every = lora_targets(transformer, ("block",))
    assert set(every) >= set(default)
    assert (len(every) > len(default)) == (name == "dit")  # PixArt's modulation is outside the blocks
    linear = {key for key, one in transformer.named_modules() if isinstance(one, nn.Linear)}
    assert set(every) == {key for key in linear if key.startswith("transformer_blocks.")}
    assert set(lora_targets(transformer, ("attention",))) | set(lora_targets(transformer, ("feed_forward",))) == set(
        default
    )


def test_the_second_attention_of_sd35_is_attention() -> None:
    second = get_backbone("sd3").tiny(dual_attention_layers=[0])
    assert {one.split(".")[2] for one in lora_targets(second, ("attention",))} == {"attn", "attn2"}


def test_blocks_without_a_site_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families have blocks of several kinds."""
    backbone = get_backbone("dit")
    monkeypatch.setattr(type(backbone), "sites", {**backbone.sites, "cross_attention": "attn2"})
    assert {one.split(".")[2] for one in lora_targets(tiny(), ("attention",))} == {"attn1"}
    with pytest.raises(DiffratioError, match="lora target 'cross_attention' holds no linear layer in backbone dit"):
        lora_targets(tiny(), ("cross_attention",))


def test_only_low_rank_updates_and_routing_are_trained() -> None:
    transformer = diffratio.apply_(tiny(), diffratio.DiffCR())
    add_lora_(transformer, LoraSettings(rank=3, alpha=6.0, dropout=0.5, targets=("self_attention",)))
    learning = {name for name, one in transformer.named_parameters() if one.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {
        "keep_ratios.rho",
        *(f"transformer_blocks.{layer}.router.{key}" for layer in range(3) for key in ("weight", "bias")),
    }
    assert sum(".lora_" in name for name in learning) == 3 * 4 * 2
    layer = adapter_layers(transformer)["transformer_blocks.1.attn1.to_q"]
    assert layer.lora_A["default"].weight.shape == (3, 16) and layer.scaling["default"] == 2.0
    assert layer.lora_dropout["default"].p == 0.5 and not layer.lora_dropout["default"].training


@pytest.mark.parametrize("lora_first", [False, True])
def test_the_order_does_not_matter(lora_first: bool) -> None:
    plain = diffratio.apply_(tiny(), diffratio.MoD(keep=0.5))
    state = {key: value for key, value in plain.state_dict().items() if ".router." in key}
    transformer = tiny()
    steps = [lambda: diffratio.apply_(transformer, diffratio.MoD(keep=0.5)), lambda: add_lora_(transformer)]
    for step in reversed(steps) if lora_first else steps:
        step()
    transformer.load_state_dict(state, strict=False)
    assert torch.equal(output(transformer), output(plain))  # B is 0
    trained(transformer)
    changed = output(transformer)
    assert not torch.allclose(changed, output(plain), atol=1e-3)
    assert diffratio.macs(transformer).fraction == diffratio.macs(plain).fraction
    diffratio.remove_(transformer)
    assert adapter_layers(transformer)
    reference = trained(add_lora_(tiny()))
    reference.load_state_dict(transformer.state_dict())
    assert torch.equal(output(transformer), output(reference))


def test_all_linear_reaches_no_router() -> None:
    transformer = diffratio.apply_(tiny(), diffratio.DiffCR())
    expected = output(transformer)
    wrapped = peft.get_peft_model(transformer, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(output(wrapped), expected)
    layers = adapter_layers(transformer)
    assert "transformer_blocks.0.attn1.to_q" in layers and not any("router" in name for name in layers)
    routers = [key for key in wrapped.state_dict() if ".router." in key]
    assert len(routers) == 6 and not any("lora" in key or "base_layer" in key for key in routers)
    with pytest.raises(DiffratioError, match="no backbone matches PeftModel.*the pipeline's transformer itself"):
        diffratio.apply_(wrapped, diffratio.ToMe(ratio=0.5))


class Adaptable(DiTTransformer2DModel, PeftAdapterMixin):
    """DiT with diffusers' adapter verbs, which SD3 and FLUX have upstream."""


def adaptable() -> Any:
    torch.manual_seed(0)
    return Adaptable.from_config(tiny().config).eval()


def hand(transformer: Any) -> Any:
    torch.manual_seed(5)  # of the routers
    return diffratio.apply_(transformer, diffratio.Hand(keep=0.5))


@pytest.mark.parametrize("adapter_first", [False, True])
def test_the_adapter_verbs_of_diffusers(adapter_first: bool) -> None:
    transformer, config = adaptable(), peft.LoraConfig(r=2, target_modules=["to_q", "to_v"])
    expected = output(hand(copy.deepcopy(transformer)))
    if adapter_first:
        transformer.add_adapter(config)
    hand(transformer)
    if not adapter_first:
        transformer.add_adapter(config)
    assert set(adapter_layers(transformer)) == {
        f"transformer_blocks.{layer}.attn1.{name}" for layer in range(3) for name in ("to_q", "to_v")
    }
    assert torch.equal(output(transformer), expected)
    changed = output(trained(transformer))
    assert not torch.allclose(changed, expected, atol=1e-3)
    transformer.disable_adapters()
    assert torch.equal(output(transformer), expected)
    transformer.enable_adapters()
    assert torch.equal(output(transformer), changed)


def test_merging_computes_the_same() -> None:
    transformer = trained(add_lora_(diffratio.apply_(tiny(), diffratio.MoD(keep=0.5))))
    expected, keys = output(transformer), list(transformer.state_dict())
    plain = diffratio.apply_(tiny(), diffratio.MoD(keep=0.5))
    plain.load_state_dict(merged_state(transformer))  # strict: the plain model's keys
    torch.testing.assert_close(output(plain), expected, atol=1e-5, rtol=1e-5)
    assert list(transformer.state_dict()) == keys and torch.equal(output(transformer), expected)
    assert merge_lora_(transformer) is transformer and not adapter_layers(transformer)
    assert transformer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(output(transformer), output(plain))
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    assert not hasattr(transformer, "peft_config")
    add_lora_(transformer)  # again
    assert torch.equal(output(transformer), output(plain))


def test_disabled_adapters_are_left_out_of_a_merge() -> None:
    transformer = trained(add_lora_(tiny()))
    for layer in adapter_layers(transformer).values():
        layer.enable_adapters(False)
    assert torch.equal(output(transformer), output(tiny()))
    state = merged_state(transformer)
    assert all(torch.equal(value, state[key]) for key, value in tiny().state_dict().items())


def test_the_digest_is_of_the_base() -> None:
    expected = weights_digest(tiny())
    transformer = add_lora_(diffratio.apply_(tiny(), diffratio.DiffCR()))
    assert weights_digest(trained(transformer)) == expected
    assert weights_digest(merge_lora_(transformer)) != expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank 0 must be an integer of at least 1; lora=none"),
        ({"rank": -4}, "lora.rank -4 must be"),
        ({"rank": True}, "lora.rank True must be"),
        ({"alpha": 0.0}, "lora.alpha 0.0 must be a positive number"),
        ({"alpha": float("nan")}, "lora.alpha nan must be"),
        ({"dropout": 1.0}, r"lora.dropout 1.0 is outside \[0, 1\)"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("atention",)}, "unknown lora target of backbone dit 'atention': did you mean attention"),
        ({"targets": ("cross_attention",)}, "known are attention, block, feed_forward, self_attention"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        add_lora_(tiny(), LoraSettings(**settings))
    assert "\n" not in str(caught.value)


def test_adapters_are_put_in_once() -> None:
    transformer = add_lora_(tiny())
    with pytest.raises(DiffratioError, match=r"has adapters in 18 layers already; diffratio.merge_lora_"):
        add_lora_(transformer)
    with pytest.raises(DiffratioError, match="has no adapters to merge; diffratio.add_lora_"):
        merge_lora_(tiny())


def test_without_peft_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DiffratioError, match=r"LoRA needs peft: pip install 'diffratio\[lora\]'"):
        add_lora_(tiny())
    assert diffratio.macs(diffratio.apply_(tiny(), diffratio.MoD(keep=0.5))).fraction < 1  # the rest does without
    assert merged_state(tiny()).keys() == tiny().state_dict().keys()
