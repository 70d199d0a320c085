"""What every method must do on every backbone."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from contract_table import (
    BACKBONES,
    CASES,
    IDS,
    LEVELS,
    ROWS,
    RUN,
    Row,
    applied,
    forward,
    in_run,
    inputs,
    keeps_state,
    label_embedders,
    pairs_halves,
    samples_of,
    train_,
    transformer_of,
    without_label_dropout,
)

import diffratio
from diffratio.backbones import backbone_of
from diffratio.errors import DiffratioError
from diffratio.methods import config_from_json, config_to_json, methods
from diffratio.surgery import attachment, compile_, is_applied, is_measured

each_case = pytest.mark.parametrize(("row", "backbone"), CASES, ids=IDS)


def gradients(transformer: torch.nn.Module, batch: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    forward(transformer, batch).square().sum().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def test_every_method_has_a_row() -> None:
    assert {row.method for row in ROWS} == set(methods())


def test_rows_name_their_method() -> None:
    for row in ROWS:
        assert row.config().method.name == row.method


@pytest.mark.parametrize("backbone", BACKBONES)
def test_methods_that_reduce_change_the_output(backbone: str) -> None:
    """Otherwise the tests of equality below would compare the dense model with itself."""
    rows = [row for row, name in CASES if name == backbone]
    plain = {paired: forward(transformer_of(backbone), None, paired) for paired in (False, True)}
    converted = {row.name: applied(row, backbone) for row in rows}
    changed = {name for name, one in converted.items() if not torch.equal(forward(one), plain[pairs_halves(one)])}
    silent = {row.name for row in rows if row.method == "dense" or row.whole_run or row.ratios}
    assert changed == {row.name for row in rows} - silent
    for row in rows:
        if row.ratios:
            dense = forward(without_label_dropout(transformer_of(backbone)).train())
            assert not torch.allclose(forward(applied(row, backbone).train()), dense, atol=1e-4)


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_identity_where_nothing_is_reduced(row: Row, backbone: str, training: bool) -> None:
    dense = without_label_dropout(transformer_of(backbone)).train(training)
    converted = train_(applied(row, backbone, neutral=True), training)
    batches = [inputs(backbone=backbone)]
    if training and row.method == "diffcr" and getattr(row.neutral(), "estimator", "") == "loop":
        # it computes sample by sample, which rounds differently
        batches = [inputs((level,), backbone=backbone) for level in LEVELS]
    for batch in batches:
        expected = forward(dense, batch, pairs_halves(converted))
        if (
            training and getattr(row.neutral(), "estimator", "") == "soft"
        ):  # attention with a bias of 0, by another kernel
            torch.testing.assert_close(forward(converted, batch), expected, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(forward(converted, batch), expected)
    if not training:
        for step in range(RUN.steps):
            assert torch.equal(forward(in_run(converted, RUN, step)), forward(dense, None, pairs_halves(converted)))


@each_case
def test_shape_and_finite(row: Row, backbone: str) -> None:
    transformer = applied(row, backbone)
    for training in (False, True):
        output = forward(train_(transformer, training))
        assert output.shape == inputs(backbone=backbone)["hidden_states"].shape
        assert output.isfinite().all()


@each_case
def test_remove_restores_exactly(row: Row, backbone: str) -> None:
    before = transformer_of(backbone)
    rates = [embedder.dropout_prob for embedder in label_embedders(before)]
    expected, classes = forward(before), [type(module) for module in before.modules()]
    keys, attributes = list(before.state_dict()), [sorted(vars(module)) for module in before.modules()]
    transformer = applied(row, backbone)
    assert is_applied(transformer)
    forward(train_(transformer))
    assert diffratio.remove_(transformer) is transformer
    transformer.eval()
    assert not is_applied(transformer)
    assert torch.equal(forward(transformer), expected)
    assert [type(module) for module in transformer.modules()] == classes
    assert [sorted(vars(module)) for module in transformer.modules()] == attributes
    assert list(transformer.state_dict()) == keys
    assert [embedder.dropout_prob for embedder in label_embedders(transformer)] == rates
    assert all(rate > 0 for rate in rates) and bool(rates) == (backbone == "dit")
    diffratio.apply_(transformer, row.config())  # nothing stays behind that would refuse a second time


@each_case
def test_state_dict_keeps_the_base_keys_and_round_trips(row: Row, backbone: str) -> None:
    base = transformer_of(backbone).state_dict()
    transformer = applied(row, backbone)
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    assert base.keys() <= state.keys()
    assert all(torch.equal(state[key], base[key]) for key in base)
    extra = [key for key in state if key not in base]
    assert all(".router." in key or key.startswith("keep_ratios.") for key in extra)
    assert bool(extra) == row.trains
    other = applied(row, backbone, seed=7)
    assert not torch.equal(forward(other), forward(transformer))
    other.load_state_dict(state, strict=True)
    assert torch.equal(forward(other), forward(transformer))
    if row.trains:
        with pytest.raises(RuntimeError, match="router"):
            transformer_of(backbone).load_state_dict(state, strict=True)


@each_case
def test_deepcopy_runs_its_own_weights(row: Row, backbone: str) -> None:
    original = applied(row, backbone)
    forward(train_(original)).sum().backward()  # state of a training forward must not be in the way
    original.eval()
    expected = forward(original)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    assert torch.equal(forward(twin), expected)
    assert not torch.equal(forward(original), expected)
    blocks = backbone_of(twin).blocks(twin)
    assert all(block._diffratio is twin._diffratio for block in blocks)
    assert twin._diffratio is not original._diffratio
    if row.trains:
        routers = attachment(twin).token_method.routers  # type: ignore[attr-defined]
        assert all(block.router is router for block, router in zip(blocks, routers, strict=True))


@each_case
def test_pickles(row: Row, backbone: str) -> None:
    transformer = applied(row, backbone)
    expected = forward(transformer)
    for twin in (pickle.loads(pickle.dumps(transformer)), _saved_and_loaded(transformer)):
        assert torch.equal(forward(twin), expected)
        diffratio.remove_(twin)
        assert torch.equal(forward(twin), forward(transformer_of(backbone)))


def _saved_and_loaded(transformer: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(transformer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@each_case
def test_autocast_in_bf16(row: Row, backbone: str) -> None:
    transformer = train_(applied(row, backbone))
    full = forward(transformer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = forward(transformer)
    half.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters() if p.grad is not None)
    error = (half.float() - full).norm() / full.norm()
    assert 0 < error < 0.5  # tokens whose choice hangs on the last bits may differ


@each_case
def test_bf16_weights(row: Row, backbone: str) -> None:
    transformer = applied(row, backbone).to(torch.bfloat16)
    batch = inputs(dtype=torch.bfloat16, backbone=backbone)
    for training in (False, True):
        output = forward(train_(transformer, training), batch)
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()


@each_case
def test_gradient_checkpointing_gives_the_same_gradients(row: Row, backbone: str) -> None:
    plain, checkpointed = train_(applied(row, backbone)), train_(applied(row, backbone))
    checkpointed.enable_gradient_checkpointing()
    if row.method == "external_cache":  # its library counts forwards
        with pytest.raises(DiffratioError, match="gradient checkpointing runs blocks twice"):
            gradients(checkpointed)
        return
    calls = {"blocks": 0}
    block_class = type(checkpointed.transformer_blocks[0]).__mro__[3]
    checkpointed.transformer_blocks[0].norm1.register_forward_hook(
        lambda *_: calls.__setitem__("blocks", calls["blocks"] + 1)
    )
    expected, got = gradients(plain), gradients(checkpointed)
    assert block_class.__name__ == type(transformer_of(backbone).transformer_blocks[0]).__name__
    assert calls["blocks"] >= 2  # it did run again
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@each_case
def test_every_parameter_gets_a_gradient(row: Row, backbone: str) -> None:
    """DDP raises for parameters that a step leaves out, whatever the regions of its batch."""
    for levels in ((0.05, 0.3, 0.55, 0.8), (0.95, 0.95), (0.1,)):
        transformer = train_(applied(row, backbone))
        got = gradients(transformer, inputs(levels, backbone=backbone))
        assert got.keys() == {name for name, p in transformer.named_parameters() if p.requires_grad}
        neutral = train_(applied(row, backbone, neutral=True))
        assert gradients(neutral, inputs(levels, backbone=backbone)).keys() == got.keys()


@each_case
def test_gradients_reach_routers_and_ratios(row: Row, backbone: str) -> None:
    if not row.trains:
        assert not [name for name, _ in applied(row, backbone).named_parameters() if "router" in name]
        return
    got = gradients(train_(applied(row, backbone)))
    for name, gradient in got.items():
        if name.endswith("router.weight") or name.endswith("rho"):
            assert gradient.abs().sum() > 0, name
    assert ("keep_ratios.rho" in got) == row.ratios
    if row.ratios:
        assert (got["keep_ratios.rho"] != 0).all()  # all regions are in the batch


@each_case
def test_samples_do_not_depend_on_their_batch(row: Row, backbone: str) -> None:
    for training in (False, True):
        transformer = train_(applied(row, backbone), training)
        batch = inputs(backbone=backbone)
        together = forward(transformer, batch)
        for i in range(len(together)):
            alone = forward(transformer, samples_of(batch, slice(i, i + 1)))
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        order = torch.tensor([3, 0, 4, 1, 2])
        shuffled = forward(transformer, samples_of(batch, order))
        torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-5)


@each_case
def test_an_open_run_agrees_with_the_timesteps(row: Row, backbone: str) -> None:
    """Regions from the run's Python numbers and from the tensor of timesteps are the same function."""
    transformer = applied(row, backbone)
    if keeps_state(transformer):
        with pytest.raises(DiffratioError, match=r"needs an open run"):
            transformer(**inputs(backbone=backbone))
        return
    for step, level in enumerate(RUN.noise_levels):
        if row.method in ("tome", "tofu", "lite_uncond") and step:  # their draws belong to the step
            break
        batch = inputs((level, level), backbone=backbone)
        standing_alone = forward(transformer, batch)
        assert torch.equal(forward(in_run(transformer, RUN, step), batch), standing_alone)
        attachment(transformer).close_run()


@each_case
def test_a_second_method_is_refused(row: Row, backbone: str) -> None:
    transformer = applied(row, backbone)
    expected = forward(transformer)
    with pytest.raises(DiffratioError, match=rf"{row.method} is applied.*remove_"):
        diffratio.apply_(transformer, diffratio.ToMe(ratio=0.25))
    assert torch.equal(forward(transformer), expected)


@each_case
def test_saving_a_learned_method_as_a_dense_model_is_refused(row: Row, backbone: str, tmp_path: Path) -> None:
    transformer = applied(row, backbone)
    if attachment(transformer).token_method.learned:
        with pytest.raises(DiffratioError, match="export"):
            transformer.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        diffratio.remove_(transformer)
    transformer.save_pretrained(tmp_path / "saved")
    loaded = type(transformer_of(backbone)).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(forward(loaded), forward(transformer_of(backbone)))


@each_case
def test_config_round_trips_as_json(row: Row, backbone: str) -> None:
    import json

    for config in (row.config(), row.neutral()):
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@each_case
def test_summary_names_the_method_and_the_tokens(row: Row, backbone: str) -> None:
    transformer = applied(row, backbone)
    text = diffratio.summary(transformer, steps=8)
    assert type(row.config()).__name__ in text
    fraction = diffratio.macs(transformer, steps=8).fraction
    measured = is_measured(transformer)  # then what a block computes differs from sample to sample
    assert f"({fraction:.3f}{', measured' if measured else ''})" in text
    assert text.count("\n  block ") == (0 if measured else 3)


@each_case
def test_fsdp_may_put_its_class_in_front(row: Row, backbone: str) -> None:
    """FSDP2 replaces classes at run time, on top of ours."""
    transformer = applied(row, backbone)
    expected = forward(transformer)
    for module in (*backbone_of(transformer).blocks(transformer), transformer):
        module.__class__ = type("Sharded" + type(module).__name__, (_Marker, type(module)), {})
    assert torch.equal(forward(transformer), expected)
    if is_measured(transformer):  # its library counts forwards
        return
    transformer.enable_gradient_checkpointing()
    assert torch.equal(
        forward(train_(transformer, row.ratios)).detach(), forward(applied(row, backbone).train(row.ratios))
    )


class _Marker:
    """Stands for `FSDPModule`."""


@each_case
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiles_as_full_graphs(row: Row, backbone: str, compiler: str) -> None:
    _check_compiled(row, backbone, compiler)


@pytest.mark.parametrize("name", ["dato", "dato release queries", "sdtm"])
def test_plans_of_drawn_numbers_compile(name: str) -> None:
    """The quick part of the above: a block makes no generator, draws come from between the steps."""
    _check_compiled(next(row for row in ROWS if row.name == name), "dit", "eager")


def test_one_full_graph_serves_every_number_of_tokens() -> None:
    """The quick part of the above; a whole run, so that every bin of the schedule is met."""
    row = next(row for row in ROWS if row.name == "diffcr schedule")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = applied(row, "dit"), applied(row, "dit")
    compile_(compiled, fullgraph=True, backend="eager")
    with torch.no_grad():
        for step in range(RUN.steps):
            expected = forward(in_run(plain, RUN, step))
            torch.testing.assert_close(forward(in_run(compiled, RUN, step)), expected, atol=1e-5, rtol=1e-5)
    # at most one more: the first block's input is laid out otherwise where nothing is gathered from it
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch.compiler.reset()


def _check_compiled(row: Row, backbone: str, compiler: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = applied(row, backbone), applied(row, backbone)
    compile_(compiled, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for training in (False, True):
            expected = forward(train_(plain, training))
            torch.testing.assert_close(forward(train_(compiled, training)), expected, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
