"""FLUX's attention with chosen image queries and keys, against the stock processor and a float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

import diffratio
from diffratio.backbones import get_backbone
from diffratio.backbones.rotary import RotaryAttention
from diffratio.errors import DiffratioError

GENERATOR = torch.Generator().manual_seed(2)
X, TEXT = torch.randn(3, 10, 16, generator=GENERATOR), torch.randn(3, 4, 16, generator=GENERATOR)
_ANGLES = torch.randn(14, 4, generator=GENERATOR).repeat_interleave(2, 1)  # of 4 text and 10 image tokens
ROTARY = (_ANGLES.cos(), _ANGLES.sin())
KINDS = ("double", "single")
each_kind = pytest.mark.parametrize("kind", KINDS)


def attention(kind: str) -> tuple[Any, Any]:
    """The same module with the stock processor and with ours."""
    modules = []
    for processor in (FluxAttnProcessor(), RotaryAttention()):
        torch.manual_seed(0)
        own: dict[str, Any] = {"added_kv_proj_dim": 16} if kind == "double" else {"pre_only": True}
        settings: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8, "out_dim": 16, "bias": True, **own}
        modules.append(FluxAttention(**settings, processor=processor).eval())
        torch.nn.init.normal_(modules[-1].norm_q.weight)
    return modules[0], modules[1]


def call(attn: Any, x: Tensor, text: Tensor, rotary: Any = ROTARY, **given: Any) -> tuple[Tensor, Tensor]:
    """Image and text results of either kind of block."""
    if attn.added_kv_proj_dim is not None:
        image, of_text = attn(x, text, image_rotary_emb=rotary, **given)
        return image, of_text
    if given:
        given["text_tokens"] = text.shape[1]
    both = attn(torch.cat([text, x], dim=1), image_rotary_emb=rotary, **given)
    return both[:, text.shape[1] :], both[:, : text.shape[1]]


def oracle(attn: Any, x: Tensor, text: Tensor, queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One sample (N, C) and its text (T, C), one head and one query at a time, by complex numbers, in float64."""
    attn, x, text = attn.double(), x.double(), text.double()
    double, count = attn.added_kv_proj_dim is not None, len(text)
    add = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if double else (attn.to_q, attn.to_k, attn.to_v)
    norms = (attn.norm_added_q, attn.norm_added_k) if double else (attn.norm_q, attn.norm_k)
    angles = torch.complex(*(one[:, ::2].double() for one in ROTARY))  # (T + N, D / 2)
    every = torch.arange(count)
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)

        def turned(rows: Tensor, at: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(rows.unflatten(-1, (-1, 2))) * angles[at]).flatten(-2)

        q = torch.cat([norms[0](add[0](text)[:, part]), attn.norm_q(attn.to_q(x)[queries][:, part])])
        k = torch.cat([norms[1](add[1](text)[:, part]), attn.norm_k(attn.to_k(x)[keys][:, part])])
        v = torch.cat([add[2](text)[:, part], attn.to_v(x)[keys][:, part]])
        q, k = turned(q, torch.cat([every, count + queries])), turned(k, torch.cat([every, count + keys]))
        added = torch.cat([torch.zeros(count, dtype=torch.float64), bias.double()])
        heads.append((q @ k.T / 8**0.5 + added).softmax(-1) @ v)
    y = torch.cat(heads, -1)
    if not double:
        return y[count:], y[:count]
    return attn.to_out[0](y[count:]), attn.to_add_out(y[:count])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_stock_processor_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    stock, ours = (module.to(dtype) for module in attention(kind))
    x, text, everything = X.to(dtype), TEXT.to(dtype), torch.arange(10)[None]
    expected = call(stock, x, text)
    assert all(map(torch.equal, call(ours, x, text), expected))
    if dtype == torch.float32:
        chosen = {"query_index": everything, "key_index": everything}
        by_sample = tuple(one.expand(3, -1, -1) for one in ROTARY)
        assert all(map(torch.equal, call(ours, x, text, **chosen), expected))
        assert all(map(torch.equal, call(ours, x, text, by_sample), expected))


@each_kind
@pytest.mark.parametrize("shared", [True, False])
def test_chosen_queries_keys_and_bias_are_what_they_say(kind: str, shared: bool) -> None:
    """Every query and key is turned to its own place; text tokens are all queries and keys, without a bias."""
    ours, wide = attention(kind)[1], attention(kind)[1]
    generator, rows = torch.Generator().manual_seed(1), 1 if shared else 3
    queries, keys = (
        torch.stack([torch.randperm(10, generator=generator)[:count].sort().values for _ in range(rows)])
        for count in (6, 5)
    )
    bias = torch.randn(rows, 5, generator=generator) * 3
    with torch.no_grad():
        biased = call(ours, X, TEXT, query_index=queries, key_index=keys, key_bias=bias)
        plain = call(ours, X, TEXT, query_index=queries, key_index=keys)
        keys_alone = call(ours, X, TEXT, key_index=keys)
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


@each_kind
def test_nested_sets_are_two_attentions(kind: str) -> None:
    ours = attention(kind)[1].double()
    x, text, nested = X.double(), TEXT.double(), torch.tensor([[0, 2, 5], [1, 2, 9], [4, 6, 8]])
    again = torch.stack([x[i, nested[i]] for i in range(3)])
    places = torch.cat([torch.arange(4).expand(3, -1), 4 + nested], dim=1)
    upper = call(ours, x, text, tuple(one.expand(3, -1, -1) for one in ROTARY))
    lower = call(ours, again, text, tuple(one[places] for one in ROTARY))
    doubled, rows = torch.cat([text, text], dim=1), torch.cat([torch.arange(14).expand(3, -1), 4 + nested], dim=1)
    found = call(ours, torch.cat([x, again], dim=1), doubled, tuple(one[rows] for one in ROTARY), nested=nested)
    for both, one, other in zip(found, upper, lower, strict=True):
        torch.testing.assert_close(both, torch.cat([one, other], dim=1), atol=1e-12, rtol=1e-12)


@each_kind
def test_a_mask_does_not_go_with_a_choice(kind: str) -> None:
    stock, ours = attention(kind)
    mask = torch.zeros(3, 1, 14, 14)
    mask[..., 7] = -1
    assert all(map(torch.equal, call(ours, X, TEXT, attention_mask=mask), call(stock, X, TEXT, attention_mask=mask)))
    with pytest.raises(DiffratioError, match="takes no attention_mask"):
        call(ours, X, TEXT, attention_mask=mask, key_index=torch.zeros(1, 1).long())
    with pytest.raises(DiffratioError, match="without index, bias and mask"):
        call(ours, X, TEXT, nested=torch.zeros(3, 2).long(), key_bias=torch.zeros(3, 10))


def test_other_processors_are_refused_and_the_same_ones_come_back() -> None:
    class Other(FluxAttnProcessor):
        """Somebody else's."""

    transformer: Any = get_backbone("flux").tiny()
    before = list(transformer.attn_processors.values())
    diffratio.apply_(transformer, diffratio.MoD(keep=0.5))
    assert {type(one) for one in transformer.attn_processors.values()} == {RotaryAttention}
    diffratio.remove_(transformer)
    assert len(before) == 3
    assert all(map(lambda one, other: one is other, transformer.attn_processors.values(), before))
    transformer.fuse_qkv_projections()
    with pytest.raises(DiffratioError, match=r"fused projections .* unfuse_qkv_projections\(\)"):
        diffratio.apply_(transformer, diffratio.MoD(keep=0.5))
    transformer.unfuse_qkv_projections()
    transformer.single_transformer_blocks[1].attn.set_processor(Other())
    with pytest.raises(DiffratioError, match=r"processor is Other,.*set_processor\(FluxAttnProcessor\(\)\)"):
        diffratio.apply_(transformer, diffratio.MoD(keep=0.5))
    assert RotaryAttention not in {type(one) for one in transformer.attn_processors.values()}
    diffratio.apply_(transformer, diffratio.FewerSteps(0.5))  # it leaves tokens alone
