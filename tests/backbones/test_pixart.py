"""PixArt: text beside the image tokens, one modulation for all blocks, any aspect ratio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import diffratio
from diffratio.backbones import check_classes, get_backbone
from diffratio.backbones.attention import TextAttention
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.surgery import attachment, run_call
from diffratio.tokens.grid import TokenGrid

PIXART = get_backbone("pixart")
XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "patch_size": 2,
}


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return PIXART.tiny(**changes).eval()


def batch_of(transformer: nn.Module, batch: int = 4, run: SamplingRun | None = None, text: int = 6) -> dict[str, Any]:
    """Samples of their own noise level and prompt length."""
    run = run or replace(PIXART.default_run(transformer, 1), text_tokens=text)
    arguments = PIXART.example(transformer, batch, run=run)
    lengths = 1 + torch.arange(batch) % run.text_tokens
    mask = (torch.arange(run.text_tokens) < lengths[:, None]).long()
    levels = torch.linspace(0.95, 0.05, batch)
    return arguments | {"encoder_attention_mask": mask, "timestep": PIXART.timestep(levels)}


def routed(transformer: Any, keep: float = 0.5) -> Any:
    diffratio.apply_(transformer, diffratio.MoD(keep=keep))
    for block in transformer.transformer_blocks:
        nn.init.normal_(block.router.weight)
    return transformer


def predict(transformer: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = transformer(**arguments, return_dict=False)[0]
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("text", [1, 7, 120])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 6, "num_layers": 2, "use_additional_conditions": True},
        {"in_channels": 4, "out_channels": 8, "caption_channels": 40},
        {"caption_channels": None, "patch_size": 4, "sample_size": 16},
    ],
)
@pytest.mark.parametrize("grid", [TokenGrid(4, 4), TokenGrid(2, 5)])
def test_dense_macs_follow_configuration_grid_and_text(changes: dict[str, Any], text: int, grid: TokenGrid) -> None:
    transformer = tiny(**changes)
    run = SamplingRun((0.5,), grid, "none", text)
    arguments = batch_of(transformer, 1, run)
    assert (
        count_macs(transformer, lambda: predict(transformer, arguments)) == diffratio.macs(transformer, run=run).total
    )


def test_the_published_model_on_the_meta_device() -> None:
    """0.6 B parameters; its forward at 256 x 256 is counted without computing it."""
    with torch.device("meta"):
        transformer: Any = PIXART.from_config(XL | {"sample_size": 32})
        run = PIXART.default_run(transformer, 1, "none")
        assert (run.grid, run.text_tokens) == (TokenGrid(16, 16), 120)
        arguments = {
            "hidden_states": torch.empty(1, 4, 32, 32),
            "encoder_hidden_states": torch.empty(1, 120, 4096),
            "timestep": torch.empty(1),
        }
        counted = count_macs(transformer, lambda: transformer(**arguments))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(0.611e9, rel=0.001)
    assert counted == diffratio.macs(transformer, run=run).total


def test_published_macs_are_those_of_the_linear_layers() -> None:
    """T-GATE (arXiv 2404.02747) counts 107.031 T for 25 guided steps at 1024 x 1024, of 611.350 M parameters."""
    with torch.device("meta"):
        alpha: Any = PIXART.from_config(XL | {"sample_size": 128})
    assert sum(parameter.numel() for parameter in alpha.parameters()) == pytest.approx(611.350e6, rel=1e-5)
    run, description = PIXART.default_run(alpha, 25, "cfg"), PIXART.describe(alpha)
    assert (run.grid.tokens, run.text_tokens) == (4096, 120)
    assert description.dense(run, linear_only=True) == pytest.approx(107.031e12, rel=0.001)
    assert description.dense(run) == pytest.approx(162.74e12, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "text", "conditions"),
    [
        ({"sample_size": 32}, 120, False),
        ({"sample_size": 64}, 120, False),
        ({"sample_size": 128}, 120, True),
        ({"sample_size": 128, "use_additional_conditions": False}, 300, False),
        ({"sample_size": 256, "use_additional_conditions": False}, 300, False),
    ],
)
def test_text_tokens_and_size_conditions_by_configuration(changes: dict[str, Any], text: int, conditions: bool) -> None:
    transformer = tiny(num_layers=1, patch_size=8, **changes)
    assert transformer.use_additional_conditions == conditions
    assert PIXART.default_run(transformer, 20).text_tokens == text == PIXART.text_tokens(transformer)
    example = PIXART.example(transformer, 2)
    assert example["encoder_hidden_states"].shape == (2, text, 12)
    assert ("added_cond_kwargs" in example) == conditions


def test_noise_level_is_the_timestep_in_thousandths() -> None:
    t = torch.tensor([0, 250, 999])
    torch.testing.assert_close(PIXART.timestep(PIXART.noise_level(t)), t.float())
    assert PIXART.noise_level(t).tolist() == pytest.approx([0.0, 0.25, 0.999])


def test_per_token_output_is_in_the_order_of_the_tokens() -> None:
    transformer = tiny(in_channels=1, out_channels=2)
    picture = torch.arange(8.0 * 4).reshape(1, 1, 8, 4)
    tokens = PIXART.per_token_output(transformer, torch.cat([picture, -picture], dim=1))
    assert tokens.shape == (1, 8, 4)
    assert tokens[0, 2].tolist() == [8, 9, 12, 13]  # second row of patches, first column
    assert (tokens >= 0).all()  # nothing of the learned variance


@pytest.mark.parametrize("grid", [TokenGrid(3, 5), TokenGrid(6, 2)])
def test_any_aspect_ratio_is_routed(grid: TokenGrid) -> None:
    dense, transformer = tiny(), routed(tiny(), 1.0)
    arguments = batch_of(dense, 3, SamplingRun((0.5,), grid, "none", 6))
    assert torch.equal(predict(transformer, arguments), predict(dense, arguments))
    fewer = predict(routed(tiny(), 0.4), arguments)
    assert fewer.shape == arguments["hidden_states"].shape and fewer.isfinite().all()
    with pytest.raises(DiffratioError, match=r"7x8 sample .* whole 2x2 patches"):
        predict(transformer, arguments | {"hidden_states": torch.zeros(3, 1, 7, 8)})


@pytest.mark.parametrize("method", ["mod", "tome", "soft"])
def test_text_is_masked_by_sample_whatever_tokens_are_computed(method: str) -> None:
    """Padding has no influence, and every sample reads its own prompt."""
    transformer = tiny()
    config: Any = {
        "mod": diffratio.MoD(keep=0.5),
        "tome": diffratio.ToMe(ratio=0.5),
        "soft": diffratio.DiffCR(estimator="soft"),
    }[method]
    diffratio.apply_(transformer, config).train(method == "soft")
    if method == "soft":
        with torch.no_grad():
            transformer.keep_ratios.rho.uniform_(0.2, 0.9, generator=torch.Generator().manual_seed(0))
    arguments = batch_of(transformer)
    before, mask = predict(transformer, arguments), arguments["encoder_attention_mask"].bool()
    assert not mask.all() and mask.any(1).all()
    noise = 5 * torch.randn(arguments["encoder_hidden_states"].shape)
    padded = arguments["encoder_hidden_states"] + noise * ~mask[..., None]
    assert torch.equal(predict(transformer, arguments | {"encoder_hidden_states": padded}), before)
    one = arguments["encoder_hidden_states"].clone()
    one[1, :1] += noise[1, :1]
    changed = (predict(transformer, arguments | {"encoder_hidden_states": one}) - before).abs().amax((1, 2, 3))
    assert changed[1] > 1e-4 and changed[[0, 2, 3]].max() == 0


def test_samples_of_different_regions_keep_their_modulation_and_size() -> None:
    """Grouped by bin, every sample goes with its own row of the modulation, of the text and of the size."""
    bins = ((10, 3, 7, 5), (4, 10, 2, 9), (6, 1, 10, 8))
    transformer = tiny(use_additional_conditions=True)
    schedule = diffratio.KeepSchedule(bins, PIXART.default_run(transformer, 8), 0.9)
    diffratio.apply_(transformer, diffratio.DiffCR(schedule))
    arguments = batch_of(transformer, 5)
    arguments["added_cond_kwargs"] = {
        "resolution": 64 + 32.0 * torch.arange(10).reshape(5, 2),
        "aspect_ratio": 0.5 + 0.25 * torch.arange(5.0)[:, None],
    }
    together = predict(transformer, arguments)
    for i in range(5):
        alone = {key: value[i : i + 1] for key, value in arguments.items() if isinstance(value, Tensor)}
        alone["added_cond_kwargs"] = {k: v[i : i + 1] for k, v in arguments["added_cond_kwargs"].items()}
        torch.testing.assert_close(predict(transformer, alone)[0], together[i], atol=1e-5, rtol=1e-5)
        alone["added_cond_kwargs"]["resolution"] = alone["added_cond_kwargs"]["resolution"] + 200
        assert not torch.allclose(predict(transformer, alone)[0], together[i], atol=1e-3)


def test_a_step_without_guidance_evaluates_the_conditional_half() -> None:
    """The unconditional half comes first, and size conditions are halved along."""
    dense, transformer = tiny(use_additional_conditions=True), tiny(use_additional_conditions=True)
    diffratio.apply_(transformer, diffratio.GuidanceInterval(skip=1.0))
    state, arguments = attachment(transformer), batch_of(dense, 4)
    state.halves = PIXART.guidance_order
    state.open_run(PIXART.default_run(transformer, 4))
    assert state.run is not None
    state.step = next(step for step in range(4) if state.run.halves_at(step) == 1)
    first, second = predict(transformer, arguments).chunk(2)
    assert torch.equal(first, second)
    torch.testing.assert_close(second, predict(dense, arguments)[2:], atol=1e-6, rtol=1e-5)


def test_a_mask_over_image_tokens_is_refused() -> None:
    transformer = routed(tiny())
    arguments = batch_of(transformer)
    with pytest.raises(DiffratioError, match=r"attention_mask does not go with .* pixart.*encoder_attention_mask"):
        transformer(**arguments, attention_mask=torch.ones(4, 16))


def test_text_attention_is_the_stock_one() -> None:
    stock, transformer = tiny(), tiny()
    processors = PIXART.index_attention_(transformer)
    assert all(isinstance(block.attn2.processor, TextAttention) for block in transformer.transformer_blocks)
    arguments = batch_of(stock)
    assert torch.equal(predict(transformer, arguments), predict(stock, arguments))
    attention = transformer.transformer_blocks[0].attn2
    x, text = torch.randn(2, 6, 24), torch.randn(2, 3, 24)
    plain = attention(x, text)
    assert torch.equal(attention(x, text, key_bias=torch.randn(2, 6), nested=torch.zeros(2, 2).long()), plain)
    with pytest.raises(DiffratioError, match="by index are for self-attention"):
        attention(x, text, key_index=torch.zeros(1, 1).long())
    with pytest.raises(DiffratioError, match="encoder_hidden_states"):
        attention(x)
    PIXART.plain_attention_(transformer, processors)
    kinds = {
        type(block.get_submodule(at).processor) for block in transformer.transformer_blocks for at in ("attn1", "attn2")
    }
    assert kinds == {AttnProcessor2_0}


def test_other_processors_of_the_text_are_refused_and_nothing_is_left_behind() -> None:
    transformer = tiny()
    transformer.transformer_blocks[1].attn2.set_processor(AttnProcessor())
    with pytest.raises(DiffratioError, match="AttnProcessor,"):
        diffratio.apply_(transformer, diffratio.ToDo(factor=2))
    assert {type(block.attn1.processor) for block in transformer.transformer_blocks} == {AttnProcessor2_0}


@pytest.mark.parametrize("changes", [{}, {"sample_size": 128, "patch_size": 32}])
def test_a_run_can_be_timed(changes: dict[str, Any]) -> None:
    transformer = routed(tiny(**changes))
    run = replace(PIXART.default_run(transformer, 2), text_tokens=9)
    seen: list[tuple[int, ...]] = []
    transformer.transformer_blocks[0].attn2.to_k.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    run_call(transformer, run, 4)()
    assert seen == [(4, 9, 24)] * 2


def test_what_needs_class_labels_says_so() -> None:
    check_classes(get_backbone("dit").tiny(), "train")
    with pytest.raises(DiffratioError, match=r"train takes class-conditional .* pixart is conditioned on text"):
        check_classes(tiny(), "train")
