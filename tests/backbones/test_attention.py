"""The attention processor with chosen queries and keys, against the stock one and a float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

import diffratio
from diffratio.backbones import get_backbone
from diffratio.backbones.attention import IndexedAttention, _learning_bias
from diffratio.errors import DiffratioError

X = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(2))


def attention(**changes: Any) -> tuple[Any, Any]:
    """The same module with the stock processor and with ours."""
    modules = []
    for processor in (AttnProcessor2_0(), IndexedAttention()):
        torch.manual_seed(0)
        settings: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8, "bias": True, "dropout": 0.0}
        modules.append(Attention(**(settings | changes), processor=processor).eval())  # type: ignore[arg-type]
    return modules[0], modules[1]


def oracle(attn: Any, x: Tensor, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """One sample (N, C), one head at a time, in float64."""
    attn = attn.double()
    x = x.double()
    q, k, v = attn.to_q(x[queries]), attn.to_k(x[keys]), attn.to_v(x[keys])
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        logits = q[:, part] @ k[:, part].T / 8**0.5 + bias.double()
        heads.append(logits.softmax(-1) @ v[:, part])
    return attn.to_out[0](torch.cat(heads, -1))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "layer_norm"}, {"bias": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_stock_processor_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype) -> None:
    stock, ours = (module.to(dtype) for module in attention(**changes))
    x = X.to(dtype)
    assert torch.equal(ours(x), stock(x))
    everything = torch.arange(10)[None]
    assert torch.equal(ours(x, query_index=everything, key_index=everything), stock(x))
    mask = torch.zeros(3, 1, 10, dtype=dtype)
    mask[:, :, 7:] = -1e4
    assert torch.equal(ours(x, attention_mask=mask), stock(x, attention_mask=mask))
    assert torch.equal(ours(x, encoder_hidden_states=x[:, :4]), stock(x, encoder_hidden_states=x[:, :4]))


@pytest.mark.parametrize("shared", [True, False])
def test_chosen_queries_keys_and_bias_are_what_they_say(shared: bool) -> None:
    _, ours = attention()
    generator = torch.Generator().manual_seed(1)
    rows = 1 if shared else 3
    queries = torch.stack([torch.randperm(10, generator=generator)[:6].sort().values for _ in range(rows)])
    keys = torch.stack([torch.randperm(10, generator=generator)[:4].sort().values for _ in range(rows)])
    bias = torch.randn(rows, 4, generator=generator) * 3
    with torch.no_grad():
        biased = ours(X, query_index=queries, key_index=keys, key_bias=bias)
        plain = ours(X, query_index=queries, key_index=keys)
        halves = [ours(X, key_index=keys), ours(X, query_index=queries)]
        assert biased.shape == plain.shape == (3, 6, 16)
        assert [tuple(one.shape) for one in halves] == [(3, 10, 16), (3, 6, 16)]
        for i in range(3):
            row = 0 if shared else i
            for found, added in ((biased, bias[row]), (plain, torch.zeros(4))):
                expected = oracle(attention()[1], X[i], queries[row], keys[row], added)
                torch.testing.assert_close(found[i].double(), expected, atol=1e-6, rtol=1e-5)


def test_a_bias_keeps_its_precision_beside_half_precision_tokens() -> None:
    """Log-weights of a thousandth apart differ in float32 and are one number in bf16."""
    _, ours = attention()
    ours, x = ours.to(torch.bfloat16), X.to(torch.bfloat16)
    low, high = torch.zeros(1, 10), torch.zeros(1, 10)
    low[0, 0], high[0, 0] = 8.001, 8.02
    assert low.to(torch.bfloat16).equal(high.to(torch.bfloat16))
    seen: list[Tensor] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        seen.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        for bias in (low, high):
            assert ours(x, key_bias=bias).dtype == torch.bfloat16
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert ours(x, key_bias=bias).dtype == torch.bfloat16
    assert all(mask.dtype == torch.float32 for mask in seen)
    assert [mask.max().item() for mask in seen] == pytest.approx([8.001, 8.001, 8.02, 8.02])


def test_gradients_reach_the_bias_and_the_tokens() -> None:
    _, ours = attention()
    x, bias = X.clone().requires_grad_(), torch.zeros(1, 10, requires_grad=True)
    ours(x, key_bias=bias).square().sum().backward()
    assert bias.grad is not None and bias.grad.abs().max() > 0
    assert x.grad is not None and x.grad.abs().max() > 0


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
def test_a_learning_bias_is_the_same_bias(dtype: torch.dtype, close: float) -> None:
    """It travels as a channel of the keys; value and gradients are those of an added bias."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, 2, 10, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    bias = torch.tensor([[0.0, -69.1, -8.001, -8.02, -0.1, 0, 0, -1e-3, -3.0, 0]] * 3)
    bias[1] = torch.tensor([-69.11, -68.9] + [-90.0] * 8)  # the two that matter are one number in bf16
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for answers, wide in ((found, dtype), (expected, torch.float64)):
        tokens = [one.to(wide).detach().clone().requires_grad_() for one in (q, k, v)]
        of_bias = bias.to(torch.promote_types(wide, torch.float32)).clone().requires_grad_()
        if answers is found:
            y = _learning_bias(*tokens, of_bias)
        else:
            logits = tokens[0] @ tokens[1].transpose(-1, -2) / 8**0.5 + of_bias[:, None, None, :]
            y = logits.softmax(-1) @ tokens[2]
        y.double().sin().sum().backward()
        answers += [y.double(), *(one.grad.double() for one in (*tokens, of_bias) if one.grad is not None)]
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=close, rtol=close)


def test_other_processors_are_not_replaced_silently() -> None:
    transformer: Any = get_backbone("dit").tiny()
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    with pytest.raises(DiffratioError, match=r"processor is AttnProcessor,.*set_processor"):
        diffratio.apply_(transformer, diffratio.ToDo(factor=2))
    assert type(transformer.transformer_blocks[0].attn1.processor) is AttnProcessor
    assert transformer.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob > 0
    _, ours = attention()
    with pytest.raises(DiffratioError, match="without a mask"):
        ours(X, attention_mask=torch.zeros(3, 1, 10), key_index=torch.arange(4)[None])


def test_remove_puts_the_same_processors_back() -> None:
    transformer: Any = get_backbone("dit").tiny()
    before = [block.attn1.processor for block in transformer.transformer_blocks]
    diffratio.apply_(transformer, diffratio.ToDo(factor=2))
    assert all(isinstance(block.attn1.processor, IndexedAttention) for block in transformer.transformer_blocks)
    diffratio.remove_(transformer)
    assert all(a.attn1.processor is b for a, b in zip(transformer.transformer_blocks, before, strict=True))
