"""Steps that are not computed in full: reuse of the output, skipped blocks, and methods that share a transformer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from every_nth import NOISE, EveryNth, EveryNthMethod, counted, dit, images, pipeline, run_of
from torch import Tensor, nn

import diffratio
from diffratio.errors import DiffratioError
from diffratio.methods.actions import Reuse, Skip
from diffratio.surgery import attachment
from diffratio.surgery.memory import StepMemory

BINS = ((10, 3, 7, 5), (4, 10, 2, 9), (6, 1, 10, 8))
REUSE, SKIP = EveryNth(2), EveryNth(2, (1, 1))


def routed() -> diffratio.DiffCR:
    return diffratio.DiffCR(diffratio.KeepSchedule(BINS, run_of(pipeline()), 0.9))


def calls_of(block: nn.Module) -> list[int]:
    """Batch sizes of the forwards of a block's first norm, which runs only if the block does."""
    seen: list[int] = []
    block.norm1.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[0]))  # type: ignore[union-attr]
    return seen


def test_reusing_every_second_output_equals_half_the_steps() -> None:
    """Flow matching, Euler steps, evenly spaced levels: two short steps along one velocity are one long step."""
    cached = pipeline(REUSE)
    seen = calls_of(cached.transformer.transformer_blocks[0])
    torch.testing.assert_close(images(cached, 8), images(pipeline(), 4), atol=1e-5, rtol=0)
    assert seen == [4] * 4
    assert not torch.allclose(images(cached, 8), images(pipeline(), 8), atol=1e-4)


@pytest.mark.parametrize("halves", ["one", "cond_first"])
def test_outputs_are_extrapolated_by_noise_level(halves: Any) -> None:
    """An output that is linear in the noise level comes out exactly, whatever the steps; alone it is used as it is."""
    memory, start, slope = StepMemory(), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    memory.keep_output(start + slope * 1.0, halves, 1.0)
    torch.testing.assert_close(memory.output(2, halves, 0.9), start + slope * 1.0)
    for level in (0.8, 0.5, 0.5):  # the last step is forwarded once more
        memory.keep_output(start + slope * level, halves, level)
    torch.testing.assert_close(memory.output(2, halves, 0.3), start + slope * 0.3)
    torch.testing.assert_close(memory.output(2, halves), start + slope * 0.5)


def test_extrapolated_steps_are_a_two_step_solver() -> None:
    """Flow Euler with X at the odd steps: x + h v, then x + h (2 v - v_before) ..., written out by hand."""
    cached = pipeline(diffratio.BlockCache(actions="CXCXCX"))
    seen = calls_of(cached.transformer.transformer_blocks[0])
    found = images(cached, 6)
    assert seen == [4] * 3
    plain = pipeline()
    outputs: list[Tensor] = []
    inner = plain.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        step = len(outputs)
        levels = [1 - one / 6 for one in range(6)]
        if step % 2 == 0:
            outputs.append(inner(*args, **kwargs)[0])
        elif step == 1:
            outputs.append(outputs[0])
        else:
            ahead = (levels[step] - levels[step - 1]) / (levels[step - 1] - levels[step - 3])
            outputs.append(outputs[step - 1] + (outputs[step - 1] - outputs[step - 3]) * ahead)
        return (outputs[step],)

    plain.transformer.forward = forward
    torch.testing.assert_close(found, images(plain, 6), atol=1e-5, rtol=0)


class Residual(nn.Module):
    """Stands for a skipped block."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states + self.residual


@pytest.mark.parametrize("blocks", [(1, 1), (0, 1), (1, 2), (0, 2)])
def test_a_skipped_range_adds_its_stored_residual(blocks: tuple[int, int]) -> None:
    """Against a dense model whose range is replaced by the residual, measured with hooks at the step before."""
    first, last = blocks
    transformer, dense = diffratio.apply_(dit(), EveryNth(2, blocks)), dit()
    state = attachment(transformer)
    state.open_run(run_of(pipeline()))
    batch = [(torch.randn(2, 1, 8, 8), torch.full((2,), level), torch.tensor([1, 2])) for level in (900.0, 700.0)]
    entered: list[Tensor] = []
    left: list[Tensor] = []
    dense.transformer_blocks[first].register_forward_hook(lambda _, args, out: entered.append(args[0]))
    dense.transformer_blocks[last].register_forward_hook(lambda _, args, out: left.append(out))
    with torch.no_grad():
        assert torch.equal(transformer(*batch[0])[0], dense(*batch[0])[0])
        state.step = 1
        result = transformer(*batch[1])[0]
        assert not torch.equal(result, dense(*batch[1])[0])
        embedder = dense.transformer_blocks[0].norm1  # the output's modulation reads block 0's embedder
        for layer in range(first, last + 1):
            dense.transformer_blocks[layer] = Residual(left[0] - entered[0] if layer == first else torch.zeros(1))
        dense.transformer_blocks[0].norm1 = embedder
        expected = dense(*batch[1])[0]
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


CONFIGS: list[list[Any]] = [
    [REUSE],
    [SKIP],
    [EveryNth(3, (0, 2))],
    [SKIP, diffratio.ToMe(ratio=0.5)],
    [REUSE, diffratio.ToDo(factor=2)],
    [SKIP, diffratio.GuidanceInterval(skip=0.5)],
    [diffratio.GuidanceInterval(skip=2, placement="noisy_first"), SKIP, diffratio.LiteUncond(keep=0.5)],
    [REUSE, diffratio.GuidanceInterval(skip=1, placement="clean_first"), diffratio.ToMe(ratio=0.25)],
]


@pytest.mark.parametrize("configs", CONFIGS, ids=str)
def test_analytic_macs_are_those_of_a_generation(configs: list[Any]) -> None:
    pipe = pipeline(*configs)
    cost = diffratio.macs(pipe.transformer, run=run_of(pipe))
    assert counted(pipe) == pytest.approx(cost.total, rel=1e-3)
    assert cost.dense == diffratio.macs(dit(), run=run_of(pipe)).total
    assert 0 < cost.fraction < 1
    assert f"({cost.fraction:.3f})" in diffratio.summary(pipe.transformer, run=run_of(pipe))


@pytest.mark.parametrize("configs", CONFIGS, ids=str)
def test_a_second_generation_equals_the_first_and_remove_restores(configs: list[Any]) -> None:
    pipe = pipeline(*configs)
    first = images(pipe)
    assert not torch.equal(first, images(pipeline()))
    images(pipe, 3, noise=NOISE.flip(0))  # nothing of another run may be left
    images(pipe, 4, scale=1.0) if not _guided(configs) else None
    assert torch.equal(images(pipe), first)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(images(twin), first)
    diffratio.remove_(pipe)
    assert type(pipe) is type(pipeline()) and type(pipe.transformer) is type(dit())
    assert not any("diffratio" in key for key in vars(pipe))
    assert torch.equal(images(pipe), images(pipeline()))


def _guided(configs: list[Any]) -> bool:
    return any(config.method.needs_guidance for config in configs)


@pytest.mark.parametrize("configs", CONFIGS, ids=str)
def test_a_sample_alone_is_the_sample_of_a_batch(configs: list[Any]) -> None:
    pipe = pipeline(*configs)
    together = images(pipe)
    for i in range(2):
        alone = images(pipe, noise=NOISE[i : i + 1], labels=[i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


def test_a_step_method_goes_on_top_of_a_routed_transformer() -> None:
    pipe = pipeline(routed())
    plain = images(pipe)
    diffratio.apply_(pipe.transformer, REUSE)
    assert [method.name for method in attachment(pipe.transformer).methods] == ["every_nth", "diffcr"]
    together = pipeline(REUSE, routed())
    together.transformer.load_state_dict(pipe.transformer.state_dict())
    assert torch.equal(images(pipe), images(together))
    assert not torch.equal(images(pipe), plain)
    run = run_of(pipe)
    alone = diffratio.apply_(dit(), routed())
    kept = diffratio.macs(alone, run=run)
    cost = diffratio.macs(pipe.transformer, run=run)
    full = [step for step in range(run.steps) if step % 2 == 0]
    halves = diffratio.SamplingRun(tuple(run.noise_levels[step] for step in full), run.grid)
    assert cost.total == diffratio.macs(alone, run=halves).total < kept.total
    for refused in (REUSE, diffratio.ToMe(ratio=0.5)):
        with pytest.raises(DiffratioError, match=r"every_nth, diffcr is applied.*remove_"):
            diffratio.apply_(pipe.transformer, refused)
    diffratio.remove_(pipe)
    assert torch.equal(images(pipe), images(pipeline()))


def test_every_method_of_a_computed_step_is_told_and_the_outermost_decides() -> None:
    pipe = pipeline(EveryNth(3), diffratio.ToMe(ratio=0.5))
    inner = attachment(pipe.transformer).token_method
    told: list[str] = []
    begin, end = inner.begin_step, inner.end_step
    inner.begin_step = lambda ctx: (told.append(f"begin {ctx.step}"), begin(ctx))[1]  # type: ignore[method-assign]
    inner.end_step = lambda y, ctx: (told.append(f"end {ctx.step}"), end(y, ctx))[1]  # type: ignore[method-assign]
    images(pipe, 5)
    assert told == ["begin 0", "end 0", "begin 3", "end 3"]
    methods = attachment(diffratio.apply_(dit(), [diffratio.ToMe(0.5), SKIP, diffratio.FewerSteps(0.5)])).methods
    assert [method.name for method in methods] == ["fewer_steps", "every_nth", "tome"]


def test_fewer_steps_and_an_interval_agree_in_either_order() -> None:
    interval = diffratio.GuidanceInterval(skip=0.4)
    orders = ([diffratio.FewerSteps(0.5), interval], [interval, diffratio.FewerSteps(0.5)])
    costs = [diffratio.macs(diffratio.apply_(dit(), list(order)), steps=20) for order in orders]
    assert costs[0] == costs[1]
    assert costs[0].fraction == 0.5 * (1 - 4 / 20)


class FirstStepReuse(EveryNthMethod):
    def action(self, step: int, run: Any) -> Any:
        return Reuse()


class Dynamic(EveryNthMethod):
    """Decides while sampling, and did not say which range."""

    def action(self, step: int, run: Any) -> Any:
        return None

    def begin_step(self, ctx: Any) -> Any:
        return Skip(0, 9) if self.config.n == 9 else Skip(0, 1)


@pytest.mark.parametrize(
    ("method", "n", "message"),
    [(FirstStepReuse, 2, "step 0 must be full"), (Dynamic, 2, r"skips\(run\)"), (Dynamic, 9, "of 3 blocks")],
)
def test_actions_that_cannot_be_done_are_refused(
    method: Any, n: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EveryNth, "method", method)
    with pytest.raises(DiffratioError, match=message):
        images(pipeline(EveryNth(n)))


def test_step_methods_need_a_run_and_one_batch() -> None:
    transformer = diffratio.apply_(dit(), SKIP)
    batch = (torch.randn(2, 1, 8, 8), torch.tensor([500.0, 500.0]), torch.tensor([1, 2]))
    with pytest.raises(DiffratioError, match=r"every_nth keeps state.*attach_\(pipe\)"):
        transformer(*batch)
    state = attachment(transformer)
    state.open_run(run_of(pipeline()))
    transformer(*batch)
    state.step = 1
    with pytest.raises(DiffratioError, match="batch changed from 2 to 1"):
        transformer(*(one[:1] for one in batch))
    for first, last in ((2, 1), (-1, 2), (0, True)):
        with pytest.raises(DiffratioError, match="skipped blocks"):
            Skip(first, last)


def test_residuals_of_all_streams_follow_the_halves() -> None:
    """Two streams, the second of which ends in the last block."""
    whole, inner = Skip(0, 2), Skip(1, 1)
    memory = StepMemory((whole, inner))
    image, text = torch.randn(4, 6, 3), torch.randn(4, 2, 3)
    memory.enter(0, (text, image))
    memory.enter(1, (text, image + 1))
    memory.leave(1, (text + 5, image + 3), "uncond_first")
    memory.leave(2, (None, image * 3), "uncond_first")
    found = memory.skip(inner, (text, image), "uncond_first")
    assert all(torch.allclose(one, two) for one, two in zip(found, (text + 5, image + 2), strict=True))  # type: ignore
    ended, grown = memory.skip(whole, (text, image), "uncond_first")
    assert ended is None and torch.allclose(grown, image * 3)  # type: ignore[arg-type]
    _, half = memory.skip(whole, (text[2:], image[2:]), "cond")  # the conditional half stands second
    assert torch.allclose(half, image[2:] * 3)  # type: ignore[arg-type]
    memory.enter(0, (text[2:], image[2:]))
    memory.leave(2, (None, image[2:] * 2), "cond")  # newer than the batched one
    _, both = memory.skip(whole, (text, torch.zeros_like(image)), "uncond_first")
    assert torch.allclose(both, torch.cat([image[2:], image[2:]]))  # type: ignore[arg-type]
    with pytest.raises(DiffratioError, match="stored their residual"):
        memory.skip(whole, (text, image), "uncond")
