"""Token merging in a whole model, against the release's own functions, and its plans' sharing."""

from __future__ import annotations

from typing import Any

import pytest
import tomesd
import torch
from guided import context, dit, generate, noise

import diffratio
from diffratio.errors import DiffratioError
from diffratio.methods.tome import ToMeMethod
from diffratio.surgery import attachment, describe


def with_tomesd(transformer: Any, ratio: float, side: int) -> Any:
    """The release's merge around self-attention, matched on each block's input."""
    for block in transformer.transformer_blocks:
        kept: dict[str, Any] = {}

        def matched(_: Any, args: Any, kwargs: Any, kept: dict[str, Any] = kept) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            removed = int(ratio * x.shape[1])
            kept["both"] = tomesd.merge.bipartite_soft_matching_random2d(x, side, side, 2, 2, removed, no_rand=True)

        inner = block.attn1.forward

        def merged(x: Any, *args: Any, inner: Any = inner, kept: dict[str, Any] = kept, **kwargs: Any) -> Any:
            merge, unmerge = kept["both"]
            return unmerge(inner(merge(x), *args, **kwargs))

        block.register_forward_pre_hook(matched, with_kwargs=True)
        block.attn1.forward = merged
    return transformer


@pytest.mark.parametrize("size", [8, 10, 14, 12])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
def test_whole_generations_equal_the_release(size: int, ratio: float) -> None:
    """Without randomness, also on 5x5 and 7x7 tokens, which whole cells do not cover."""
    x = noise(2, size)
    theirs = generate(with_tomesd(dit(sample_size=size), ratio, size // 2), x)
    ours = generate(diffratio.apply_(dit(sample_size=size), diffratio.ToMe(ratio, random=False)), x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, generate(dit(sample_size=size), x), atol=1e-3)


def plans_made(monkeypatch: pytest.MonkeyPatch, config: diffratio.ToMe, steps: int) -> list[int]:
    """How many matchings each step of a generation makes."""
    import diffratio.methods.tome as module

    made = [0] * steps
    transformer = diffratio.apply_(dit(num_layers=5), config)
    matching = module.bipartite_merge

    def spy(*args: Any) -> Any:
        made[attachment(transformer).step] += 1
        return matching(*args)

    monkeypatch.setattr(module, "bipartite_merge", spy)
    generate(transformer, noise(1), steps=steps)
    planning = diffratio.macs(transformer, steps=steps).planning
    assert planning == 2 * sum(made) * 27 * 9 * 16  # both halves, N_src, N_dst, d
    return made


def test_blocks_and_steps_share_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plans_made(monkeypatch, diffratio.ToMe(0.5), 3) == [5, 5, 5]
    assert plans_made(monkeypatch, diffratio.ToMe(0.5, plan_blocks=2), 3) == [3, 3, 3]
    assert plans_made(monkeypatch, diffratio.ToMe(0.5, plan_blocks=None), 3) == [1, 1, 1]
    assert plans_made(monkeypatch, diffratio.ToMe(0.5, plan_blocks=None, plan_every=2), 5) == [1, 0, 1, 0, 1]
    assert plans_made(monkeypatch, diffratio.ToMe(0.5, layers=(0, 2, 3), plan_blocks=2), 2) == [2, 2]


def test_a_shared_plan_is_the_first_blocks_own() -> None:
    method = ToMeMethod(diffratio.ToMe(0.5, plan_blocks=2, layers=(0, 2)), describe(dit()))
    first, other = torch.randn(2, 36, 16), torch.randn(2, 36, 16)
    method.begin_step(context(0))
    method.plan(0, "block", first, context(0))
    shared: Any = method.plan(0, "self_attention", first, context(0))
    assert method.plan(1, "block", other, context(0)) is None
    assert method.plan(1, "self_attention", other, context(0)) is None  # no merging block
    method.plan(2, "block", other, context(0))
    assert method.plan(2, "self_attention", other, context(0)) is shared
    method.begin_step(context(1))
    method.plan(0, "block", first, context(1))
    again: Any = method.plan(0, "self_attention", first, context(1))
    assert not torch.equal(again.slots, shared.slots)  # drawn anew


@pytest.mark.parametrize("cls", [diffratio.ToMe, diffratio.ToFu])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.8}, r"ratio 0.8 is outside \[0, 0.75\]: each 2x2 cell keeps one token"),
        ({"ratio": "half"}, "ratio 'half' is outside"),
        ({"plan_every": 0}, "plan_every must be an integer of at least 1"),
        ({"plan_blocks": 1.5}, "plan_blocks must be an integer of at least 1"),
        ({"metric": "normed", "plan_blocks": None}, "metric 'normed' plans at every site"),
        ({"sites": ("attention",)}, "unknown .* site 'attention'"),
    ],
)
def test_bad_settings_are_one_line(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        cls(**settings)
    assert "\n" not in str(caught.value) and cls.__name__.lower() in str(caught.value)


def test_sharing_over_steps_needs_a_run() -> None:
    transformer = diffratio.apply_(dit(), diffratio.ToMe(0.5, plan_every=2))
    with pytest.raises(DiffratioError, match=r"plan_every=2.*attach_\(pipe\).*plan_every=1"):
        transformer(noise(), torch.full((3,), 500.0), torch.tensor([1, 2, 3]))
