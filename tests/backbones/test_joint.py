"""Joint attention with chosen image queries and keys, against the stock processor and a float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor

import diffratio
from diffratio.backbones import get_backbone
from diffratio.backbones.joint import JointAttention, attend, attend_nested
from diffratio.errors import DiffratioError

GENERATOR = torch.Generator().manual_seed(2)
X, TEXT = torch.randn(3, 10, 16, generator=GENERATOR), torch.randn(3, 4, 16, generator=GENERATOR)


def attention(**changes: Any) -> tuple[Any, Any]:
    """The same module with the stock processor and with ours."""
    modules = []
    for processor in (JointAttnProcessor2_0(), JointAttention()):
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "query_dim": 16,
            "added_kv_proj_dim": 16,
            "heads": 2,
            "dim_head": 8,
            "out_dim": 16,
            "context_pre_only": False,
            "bias": True,
        }
        modules.append(Attention(**(settings | changes), processor=processor).eval())  # type: ignore[arg-type]
    return modules[0], modules[1]


def oracle(attn: Any, x: Tensor, text: Tensor, queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One sample (N, C) and its text (T, C), one head at a time, in float64."""
    attn, x, text = attn.double(), x.double(), text.double()
    q = torch.cat([attn.to_q(x[queries]), attn.add_q_proj(text)])
    k = torch.cat([attn.to_k(x[keys]), attn.add_k_proj(text)])
    v = torch.cat([attn.to_v(x[keys]), attn.add_v_proj(text)])
    added = torch.cat([bias.double(), torch.zeros(len(text), dtype=torch.float64)])
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        heads.append((q[:, part] @ k[:, part].T / 8**0.5 + added).softmax(-1) @ v[:, part])
    y = torch.cat(heads, -1)
    return attn.to_out[0](y[: len(queries)]), attn.to_add_out(y[len(queries) :])


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "rms_norm"}, {"context_pre_only": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_stock_processor_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype) -> None:
    stock, ours = (module.to(dtype) for module in attention(**changes))
    x, text, everything = X.to(dtype), TEXT.to(dtype), torch.arange(10)[None]
    chosen = {"query_index": everything, "key_index": everything}
    # projected out of a contiguous tensor, where the stock processor's is a slice: bf16 then rounds the bias otherwise
    for given in ({}, chosen) if dtype == torch.float32 else ({},):
        assert all(map(torch.equal, ours(x, text, **given), stock(x, text)))
        assert torch.equal(ours(x, **given), stock(x))  # the second attention of SD3.5 has no text


@pytest.mark.parametrize("shared", [True, False])
def test_chosen_queries_keys_and_bias_are_what_they_say(shared: bool) -> None:
    """Text tokens are all queries and keys, without a bias of their own."""
    _, ours = attention()
    generator, rows = torch.Generator().manual_seed(1), 1 if shared else 3
    queries, keys = (
        torch.stack([torch.randperm(10, generator=generator)[:count].sort().values for _ in range(rows)])
        for count in (6, 5)
    )
    bias, wide = torch.randn(rows, 5, generator=generator) * 3, attention()[1]
    with torch.no_grad():
        biased = ours(X, TEXT, query_index=queries, key_index=keys, key_bias=bias)
        plain = ours(X, TEXT, query_index=queries, key_index=keys)
        keys_alone = ours(X, TEXT, key_index=keys)
        assert [tuple(one.shape) for one in (*plain, *keys_alone)] == [(3, 6, 16), (3, 4, 16), (3, 10, 16), (3, 4, 16)]
        for i in range(3):
            row, every = 0 if shared else i, torch.arange(10)
            for found, chosen, added in (
                (biased, queries[row], bias[row]),
                (plain, queries[row], torch.zeros(5)),
                (keys_alone, every, torch.zeros(5)),
            ):
                expected = oracle(wide, X[i], TEXT[i], chosen, keys[row], added)
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one[i].double(), other, atol=1e-6, rtol=1e-5)


def test_a_bias_that_learns_is_the_same_bias() -> None:
    for module in attention(qk_norm="rms_norm"):
        module.double()
    ours = attention(qk_norm="rms_norm")[1].double()
    x, text = X.double(), TEXT.double()
    bias = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learning = bias.clone().requires_grad_()
    found = ours(x, text, key_bias=learning)
    for one, other in zip(found, ours(x, text, key_bias=bias), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    found[1].square().sum().backward()  # the text feels it too
    assert learning.grad is not None and (learning.grad != 0).all()


@pytest.mark.parametrize("with_text", [True, False])
def test_nested_sets_are_two_attentions(with_text: bool) -> None:
    ours = attention(qk_norm="rms_norm")[1].double()
    x, nested = X.double(), torch.tensor([[0, 2, 5], [1, 2, 9], [4, 6, 8]])
    again = torch.stack([x[i, nested[i]] for i in range(3)])
    text = TEXT.double() if with_text else None
    doubled = None if text is None else torch.cat([text, text], dim=1)
    found = ours(torch.cat([x, again], dim=1), doubled, nested=nested)
    upper, lower = ours(x, text), ours(again, text)
    pairs = [(found, upper, lower)] if text is None else list(zip(found, upper, lower, strict=True))
    for both, one, other in pairs:
        torch.testing.assert_close(both, torch.cat([one, other], dim=1), atol=1e-12, rtol=1e-12)


def test_the_order_of_the_streams_changes_nothing_but_the_order() -> None:
    generator = torch.Generator().manual_seed(4)

    def heads(tokens: int) -> Any:
        return tuple(torch.randn(2, 2, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))

    image, text, bias = heads(6), heads(3), torch.randn(2, 6, dtype=torch.float64, generator=generator)
    nested = torch.tensor([[0, 3], [1, 5]])
    for one, other in (
        (attend(image, text, bias), attend(image, text, bias, text_first=True)),
        (attend_nested(image, text, nested), attend_nested(image, text, nested, text_first=True)),
    ):
        for found, expected in zip(one, other, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_what_the_stock_processor_would_ignore_is_refused() -> None:
    _, ours = attention()
    with pytest.raises(DiffratioError, match="takes no attention_mask"):
        ours(X, TEXT, attention_mask=torch.zeros(3, 1, 10))
    with pytest.raises(DiffratioError, match="without index, bias and mask"):
        ours(X, TEXT, nested=torch.zeros(3, 2).long(), key_bias=torch.zeros(3, 10))


def test_other_processors_are_refused_and_the_same_ones_come_back() -> None:
    class Other(JointAttnProcessor2_0):
        """Somebody else's."""

    transformer: Any = get_backbone("sd3").tiny()
    before = [processor for processor in transformer.attn_processors.values()]
    diffratio.apply_(transformer, diffratio.ToDo(factor=2))
    assert {type(one) for one in transformer.attn_processors.values()} == {JointAttention}
    diffratio.remove_(transformer)
    assert len(before) == 4  # three blocks and a second attention
    assert all(map(lambda one, other: one is other, transformer.attn_processors.values(), before))
    transformer.transformer_blocks[1].attn.set_processor(Other())
    with pytest.raises(DiffratioError, match=r"processor is Other,.*set_processor\(JointAttnProcessor2_0\(\)\)"):
        diffratio.apply_(transformer, diffratio.ToDo(factor=2))
    assert JointAttention not in {type(one) for one in transformer.attn_processors.values()}
