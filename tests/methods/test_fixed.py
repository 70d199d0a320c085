"""Fixed schedules and their rankings: what is drawn, what is kept, what is bypassed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffratio
from diffratio.backbones import get_backbone
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.methods.block_drop import BlockDropMethod, middle_out
from diffratio.methods.fixed import strided
from diffratio.methods.mod import uniform_schedule
from diffratio.routing.schedule import KeepSchedule
from diffratio.surgery import attachment, describe
from diffratio.tokens.grid import TokenGrid

RUN = uniform_run(8, TokenGrid(4, 4))


def transformer_of(config: diffratio.methods.MethodConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    transformer: torch.nn.Module = diffratio.apply_(get_backbone("dit").tiny().eval(), config, seed=seed)
    return transformer


def kept(transformer: torch.nn.Module, levels: tuple[float, ...], step: int | None = None) -> list[torch.Tensor | None]:
    """Kept tokens of each block of one forward."""
    state = attachment(transformer)
    state.close_run()
    if step is not None:
        state.open_run(RUN)
        state.step = step
    method = state.token_method
    method.kept_index = []  # type: ignore[attr-defined]
    torch.manual_seed(1)
    batch = len(levels)
    times, labels = 1000 * torch.tensor(levels), torch.zeros(batch, dtype=torch.long)
    with torch.no_grad():
        transformer(torch.randn(batch, 1, 8, 8), timestep=times, class_labels=labels)
    return list(method.kept_index)  # type: ignore[attr-defined]


def test_a_step_has_one_random_draw_for_all_samples_and_halves() -> None:
    transformer = transformer_of(diffratio.RandomKeep(keep=0.5))
    first = kept(transformer, (1.0, 1.0), step=0)
    assert all(index is not None and index.shape == (1, 8) for index in first)
    again, later = kept(transformer, (1.0,), step=0), kept(transformer, (0.875,), step=1)
    other = kept(transformer_of(diffratio.RandomKeep(keep=0.5), seed=1), (1.0,), step=0)
    for layer in range(3):
        assert torch.equal(first[layer], again[layer])  # type: ignore[arg-type]
        assert not torch.equal(first[layer], later[layer])  # type: ignore[arg-type]
        assert not torch.equal(first[layer], other[layer])  # type: ignore[arg-type]
    assert not torch.equal(first[0], first[1])  # type: ignore[arg-type]


def test_while_training_each_sample_has_its_own_draw_whatever_its_batch() -> None:
    transformer = transformer_of(diffratio.RandomKeep(keep=0.5))
    together = kept(transformer, (0.31, 0.62, 0.93))
    for sample, level in enumerate((0.31, 0.62, 0.93)):
        alone = kept(transformer, (level,))
        for layer in range(3):
            assert torch.equal(together[layer][sample], alone[layer][0])  # type: ignore[index]
    assert not torch.equal(together[0][0], together[0][1])  # type: ignore[index]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 4), st.floats(0.2, 0.8))
def test_strided_places_are_spread_evenly(height: int, width: int, layers: int, share: float) -> None:
    """Every half of the grid gets its share, to within a row or a column."""
    scores = strided(TokenGrid(height, width), layers)
    assert scores.shape == (layers, height * width) and scores.min() >= 0 and scores.max() < 1
    count = max(1, round(share * height * width))
    for row in scores:
        chosen = torch.zeros(height * width)
        chosen[row.argsort(descending=True)[:count]] = 1
        grid = chosen.view(height, width)
        halves = grid[: height // 2].mean(), grid[height - height // 2 :].mean()
        assert abs(halves[0] - halves[1]) < 1.5 * (1 / height + 1 / width)


def test_deviation_keeps_the_tokens_that_stand_out() -> None:
    method = diffratio.methods.get_method("measured")
    config = diffratio.Measured(KeepSchedule(((5,),) * 3, RUN), "deviation")
    built = method(config, describe(get_backbone("dit").tiny()))
    x = torch.zeros(2, 16, 16)
    x[0, 3], x[1, 9] = 1.0, -1.0
    scores = built.scores(0, x)  # type: ignore[attr-defined]
    assert scores.argmax(1).tolist() == [3, 9]
    assert built.block_modules() is None


def test_training_free_rankings_have_no_parameters_and_cheap_ones_no_cost() -> None:
    schedule = KeepSchedule(((5,),) * 3, RUN)
    planning = {}
    for ranking in ("router", "deviation", "strided", "random"):
        transformer = transformer_of(diffratio.Measured(schedule, ranking))
        planning[ranking] = diffratio.macs(transformer, run=RUN).planning
        assert any("router" in name for name, _ in transformer.named_parameters()) == (ranking == "router")
    assert planning["router"] == planning["deviation"] > 0 == planning["strided"] == planning["random"]


def test_a_bypassed_block_changes_nothing_and_stays_in_the_training_graph() -> None:
    transformer = transformer_of(diffratio.BlockDrop(blocks=(1,)))
    batch = {"timestep": torch.tensor([300.0, 900.0]), "class_labels": torch.tensor([1, 2])}
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = transformer(x, **batch)[0]
        for parameter in transformer.transformer_blocks[1].parameters():  # type: ignore[index,union-attr]
            parameter.normal_()
        assert torch.equal(transformer(x, **batch)[0], expected)
    transformer.train()
    output = transformer(x, **batch)[0]
    assert torch.equal(output.detach(), expected)
    output.square().sum().backward()
    dropped = list(transformer.transformer_blocks[1].parameters())  # type: ignore[index,union-attr]
    assert all(p.grad is not None and not p.grad.any() for p in dropped)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


def test_block_drop_goes_from_the_middle_or_in_the_given_order() -> None:
    assert middle_out(5) == (2, 1, 3, 0, 4)
    description = describe(get_backbone("dit").tiny(num_layers=5))
    default = BlockDropMethod.for_budget(description, RUN, 0.7)
    given_order = BlockDropMethod.for_budget(description, RUN, 0.7, (4, 0, 1, 2, 3))
    assert default.blocks == (2,) and given_order.blocks == (4,)
    assert min(default.schedule.bins[1]) == 0 and min(given_order.schedule.bins[0]) == 0  # type: ignore[union-attr]
    for config in (default, given_order):
        assert not config.as_published
        assert 0.69 <= config.method(config, description).macs(RUN).fraction <= 0.7
        partial = [bin_ for row in config.schedule.bins for bin_ in row if bin_ not in (0, 10)]  # type: ignore[union-attr]
        assert len(partial) <= 1
    whole = diffratio.BlockDrop(blocks=(2,))
    fraction = whole.method(whole, description).macs(RUN).fraction
    assert BlockDropMethod.for_budget(description, RUN, fraction).as_published


def test_random_keep_keeps_as_many_as_mod() -> None:
    description = describe(get_backbone("dit").tiny(num_layers=8))
    config = diffratio.methods.get_method("random_keep").for_budget(description, RUN, 0.7)
    assert config.schedule == uniform_schedule(description, RUN, 0.7, "random_keep", router=False)
    assert 0.69 <= config.method(config, description).macs(RUN).fraction <= 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffratio.Measured(ranking="best"), "unknown Measured ranking 'best'"),
        (lambda: diffratio.RandomKeep(ranking="strided"), "is not 'random'"),
        (lambda: diffratio.RandomKeep(keep=0), "outside"),
        (lambda: diffratio.BlockDrop(ranking="router"), "ranks no tokens"),
        (lambda: diffratio.BlockDrop(blocks=(-1,)), "integers from 0"),
        (lambda: transformer_of(diffratio.BlockDrop(blocks=(3,))), "do not fit a model of 3 blocks"),
        (lambda: BlockDropMethod.for_budget(describe(get_backbone("dit").tiny()), RUN, 0.7, (0, 0, 1)), "each of the"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
