"""What all merging methods promise of whole guided generations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from guided import dit, generate, guided_forward, noise

import diffratio
from diffratio.cost.count import count_macs
from diffratio.errors import DiffratioError
from diffratio.methods import get_method
from diffratio.methods.merging import RunState, whole
from diffratio.surgery import attachment, describe

BOTH = ("self_attention", "feed_forward")
CONFIGS: dict[str, Any] = {
    "tome": diffratio.ToMe(0.5, BOTH),
    "tome shared": diffratio.ToMe(0.5, BOTH, plan_blocks=2, plan_every=2),
    "tome mixed": diffratio.ToMe(0.33, BOTH, mix=True),
    "tofu": diffratio.ToFu(0.5, BOTH),
    "tofu by steps": diffratio.ToFu(0.5, BOTH, over="steps", plan_blocks=None),
    "sdtm": diffratio.SDTM(),
    "sdtm release": diffratio.SDTM(variant="release", plan_blocks=1),
    "sdtm shared, mixed": diffratio.SDTM(0.4, 0.1, plan_every=2, mix=True, detail_sites=BOTH),
    "sdtm cached": diffratio.SDTMCached(),
    "importance": diffratio.Importance(blocks=1.0),
    "importance sd": diffratio.Importance("sd", sites=BOTH),
    "importance sd, one plan": diffratio.Importance("sd", plan_blocks=None, mix=True, ratio=0.41),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=[name.replace(" ", "_") for name in CONFIGS])
SIZES = (8, 10, 14)  # 4x4, 5x5 and 7x7 tokens


def merged(config: Any, size: int = 12, seed: int = 0, weights: int = 0) -> Any:
    return diffratio.apply_(dit(weights, sample_size=size), config, seed=seed)


@each
@pytest.mark.parametrize("size", SIZES)
def test_it_generates_something_else_than_the_dense_model(config: Any, size: int) -> None:
    x = noise(2, size)
    result = generate(merged(config, size), x)
    assert result.isfinite().all()
    assert not torch.allclose(result, generate(dit(sample_size=size), x), atol=1e-3)


@each
def test_the_order_of_the_halves_does_not_matter(config: Any) -> None:
    x = noise()
    torch.testing.assert_close(
        generate(merged(config), x, order="uncond_first"), generate(merged(config), x), atol=1e-4, rtol=1e-4
    )


@each
def test_a_sample_alone_is_the_sample_in_its_batch(config: Any) -> None:
    x, labels = noise(), torch.tensor([4, 1, 7])
    together = generate(merged(config), x, labels)
    transformer = merged(config)
    for i in range(len(x)):
        alone = generate(transformer, x[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@each
def test_generations_in_one_process_do_not_disturb_each_other(config: Any) -> None:
    first, second = merged(config), merged(config, weights=1)
    x = noise()
    expected, other = generate(first, x), generate(second, x, steps=4)

    def interrupt(step: int) -> None:
        assert torch.equal(generate(second, x, steps=4), other)
        if step == 2:
            copy.deepcopy(first), pickle.dumps(first)

    assert torch.equal(generate(first, x, visit=interrupt), expected)
    attachment(first).open_run(attachment(second).run or diffratio.SamplingRun((1.0, 0.5), diffratio.TokenGrid(6, 6)))
    assert torch.equal(generate(first, x), expected)  # after a run that was given up


@each
def test_draws_depend_on_the_seed(config: Any) -> None:
    x = noise()
    same = torch.equal(generate(merged(config, seed=1), x), generate(merged(config, seed=2), x))
    assert not same
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(generate(merged(config, seed=1), x), generate(merged(config, seed=1), x))


NEUTRAL = [diffratio.ToMe(0.0), diffratio.ToFu(0.0), diffratio.SDTM(0.0, 0.0), diffratio.Importance(ratio=0.0)]


@pytest.mark.parametrize("config", NEUTRAL, ids=lambda config: type(config).__name__)
def test_ratio_zero_is_the_dense_model_bit_for_bit(config: Any) -> None:
    x = noise()
    assert torch.equal(generate(merged(config), x), generate(dit(), x))


@each
def test_whole_runs_cost_what_the_formula_says(config: Any) -> None:
    transformer = merged(config)
    count = count_macs(transformer, lambda: generate(transformer, noise(1), steps=7))
    assert count == pytest.approx(diffratio.macs(transformer, steps=7).total, rel=1e-3)


@pytest.mark.parametrize("name", ["tome", "tofu", "sdtm", "importance"])
@pytest.mark.parametrize("sides", [(8, 8), (9, 13)])
def test_every_budget_in_reach_is_met(name: str, sides: tuple[int, int]) -> None:
    from diffratio.cost.run import uniform_run

    transformer = dit(num_layers=6, num_attention_heads=4, attention_head_dim=16)
    description, run = describe(transformer), uniform_run(20, diffratio.TokenGrid(*sides))
    for percent in (97, 93, 88, 74, 61, 45, 34):
        config = diffratio.for_budget(name, transformer, percent / 100, run=run)
        fraction = get_method(name)(config, description).macs(run).fraction
        assert percent / 100 - 0.01 <= fraction <= percent / 100 + 1e-9
        if percent == 93:
            assert config.as_published
    assert not config.as_published  # so far down only wider sites get it
    with pytest.raises(diffratio.BudgetUnreachable) as caught:
        diffratio.for_budget(name, transformer, 0.1, run=run)
    low, high = caught.value.reachable
    assert 0.1 < low < 0.34 and high == 1.0


@each
def test_a_grid_without_a_cell_is_refused(config: Any) -> None:
    transformer = merged(config, size=2)
    with pytest.raises(DiffratioError, match="1x1 token grid holds no whole 2x2 cell"):
        generate(transformer, noise(1, 2))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("tome", "tome mixed", "tofu")])
def test_steps_and_samples_of_a_run_must_follow_each_other(name: str) -> None:
    transformer, x = merged(CONFIGS[name]), noise()
    if name == "tofu by steps":
        with pytest.raises(DiffratioError, match="tofu: over='steps'.*attach_"):
            transformer(x, torch.full((3,), 500.0), torch.tensor([1, 2, 3]))
        return

    def skip(step: int) -> None:
        attachment(transformer).step += step == 1

    with pytest.raises(
        DiffratioError, match=r"follows a run step by step, but step 3 came after step 1.*set_timesteps"
    ):
        generate(transformer, x, visit=skip)
    attachment(transformer).close_run()
    with pytest.raises(DiffratioError, match="needs an open run"):
        transformer(x, torch.full((3,), 500.0), torch.tensor([1, 2, 3]))

    state = attachment(transformer)
    state.open_run(diffratio.SamplingRun((1.0, 0.8, 0.6, 0.4), diffratio.TokenGrid(6, 6)))
    guided_forward(transformer, noise(3), 1.0, torch.tensor([1, 2, 3]), "cond_first")
    state.step += 1
    with pytest.raises(DiffratioError, match="began with . samples and now has"):
        guided_forward(transformer, noise(2), 0.8, torch.tensor([1, 2]), "cond_first")


def test_a_step_that_is_forwarded_twice_sees_the_same_state() -> None:
    state: RunState[int] = RunState("it")
    state.begin(0)
    state.next = 1
    state.begin(1)
    assert state.value == 1
    state.next = 2
    state.begin(1)
    assert (state.value, state.next) == (1, None)
    state.next = 2
    state.begin(2)
    assert state.value == 2
    state.begin(0)
    assert state.value is None
    with pytest.raises(DiffratioError, match="step 1 came after none"):
        RunState[int]("it").begin(1)


def test_mixed_counts_are_neighbours_whose_mean_is_the_amount() -> None:
    for amount in (0.0, 0.25, 3.0, 7.4, 11.999):
        counts = [whole(amount, turn, True) for turn in range(200)]
        assert set(counts) <= {int(amount), int(amount) + 1}
        assert abs(sum(counts) - 200 * amount) < 1 + 1e-6
        assert whole(amount, 17, False) == int(amount)
