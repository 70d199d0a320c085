"""SD3 and SD3.5: two streams in joint attention, of which image tokens alone are routed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import JointAttnProcessor2_0
from quotients import check_ratio_gradient
from torch import Tensor, nn

import diffratio
from diffratio.backbones import check_classes, get_backbone
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods import Method, get_method, methods
from diffratio.methods.base import BlockCall
from diffratio.methods.routed import RoutedMethod
from diffratio.surgery import attachment, run_call
from diffratio.tokens.grid import TokenGrid

SD3 = get_backbone("sd3")
FORMS: dict[str, dict[str, Any]] = {"3": {"dual_attention_layers": (), "qk_norm": None}, "3.5": {}}
each_form = pytest.mark.parametrize("form", FORMS)
MEDIUM = {  # SD3.5-medium
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LEVELS = (0.05, 0.3, 0.1, 0.55, 0.8, 0.95)  # regions 0 1 0 2 3 3
MIXED = [[0.5, 0.13, 1.0, 0.31], [0.42, 0.2, 0.91, 0.1], [0.7, 0.74, 0.7, 0.45]]
TEXT, GRID = 5, TokenGrid(4, 4)


def tiny(form: str = "3.5", **changes: Any) -> Any:
    torch.manual_seed(0)
    return SD3.tiny(**FORMS[form] | changes).eval()


def run_of(grid: TokenGrid = GRID, steps: int = 1, text: int = TEXT, guidance: Any = "none") -> SamplingRun:
    return uniform_run(steps, grid, guidance, text)


def batch_of(transformer: nn.Module, levels: tuple[float, ...] = LEVELS, run: SamplingRun | None = None) -> Any:
    arguments = SD3.example(transformer, len(levels), run=run or run_of())
    return arguments | {"timestep": SD3.timestep(torch.tensor(levels))}


def predict(transformer: Any, arguments: dict[str, Any], grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        output = transformer(**arguments, return_dict=False)[0]
    assert isinstance(output, Tensor)
    return output


def learning(table: Any, estimator: str = "grouped", form: str = "3.5", **changes: Any) -> Any:
    """In training, with the ratios at a table [layer][region]."""
    transformer = tiny(form, **changes)
    diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator)).double().train()
    with torch.no_grad():
        transformer.keep_ratios.rho.copy_(torch.tensor(table, dtype=torch.float64))
        for block in transformer.transformer_blocks:
            block.router.weight.mul_(20)  # gates away from one half
    return transformer


def loss_of(transformer: Any) -> Tensor:
    batch = {name: value.double() for name, value in batch_of(transformer).items()}
    output = predict(transformer, batch, grad=True)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (output - target).square().mean()


@pytest.mark.parametrize("text", [1, 333])
@pytest.mark.parametrize("grid", [TokenGrid(4, 4), TokenGrid(2, 5)])
@pytest.mark.parametrize(
    "changes",
    [
        FORMS["3"],
        {"dual_attention_layers": (0, 1, 2), "num_layers": 3},  # the last one too
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "joint_attention_dim": 20},
        {"num_layers": 1, "patch_size": 4, "pooled_projection_dim": 9},
    ],
    ids=str,
)
def test_dense_macs_follow_configuration_grid_and_text(changes: dict[str, Any], grid: TokenGrid, text: int) -> None:
    transformer, run = tiny(**changes), run_of(grid, text=text)
    arguments = batch_of(transformer, (0.5,), run)
    counted = count_macs(transformer, lambda: predict(transformer, arguments))
    assert counted == diffratio.macs(transformer, run=run).total


@pytest.mark.slow
def test_the_published_medium_model_on_the_meta_device() -> None:
    """2.2 B parameters; its forward at 1024 x 1024 is counted without computing it."""
    with torch.device("meta"):
        transformer: Any = SD3.from_config(MEDIUM)
        run = SD3.default_run(transformer, 1, "none")
        assert (run.grid, run.text_tokens) == (TokenGrid(64, 64), 333)
        arguments = {
            "hidden_states": torch.empty(1, 16, 128, 128),
            "encoder_hidden_states": torch.empty(1, 333, 4096),
            "pooled_projections": torch.empty(1, 2048),
            "timestep": torch.empty(1),
        }
        counted = count_macs(transformer, lambda: transformer(**arguments))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(2.24e9, rel=0.01)
    assert counted == diffratio.macs(transformer, run=run).total


@pytest.mark.parametrize("name", [name for name in methods() if get_method(name).static])
def test_every_method_runs_and_costs_what_is_counted(name: str) -> None:
    """SD3's form; SD3.5's is in the contract table."""
    transformer, run = tiny("3", sample_size=16), run_of(TokenGrid(8, 8), 4, guidance="cfg")
    budget = 0.75 if name in ("fewer_steps", "guidance_interval") else 0.77  # whole steps
    try:
        config: Any = diffratio.for_budget(name, transformer, budget, run=run)
        assert budget - 0.01 <= config.method(config, SD3.describe(transformer)).macs(run).fraction <= budget
    except BudgetUnreachable:
        assert name in ("block_cache", "dense", "diffcr", "measured")
        schedule = diffratio.KeepSchedule(((10, 3), (4, 7), (5, 0)), run, 0.77)
        config = {
            "block_cache": diffratio.BlockCache(),  # whole blocks of whole steps
            "dense": diffratio.Dense(),
            "diffcr": diffratio.DiffCR(schedule),
            "measured": diffratio.Measured(schedule),
        }[name]
    arguments = [batch_of(transformer, (level,), run) for level in run.noise_levels]
    dense = predict(transformer, _both(arguments[-1]))
    state = attachment(diffratio.apply_(transformer, config))
    evaluated, counted = state.adapt(run), 0
    state.halves = SD3.guidance_order
    state.open_run(evaluated)
    for step, level in enumerate(evaluated.noise_levels):
        state.step = step
        both = _both(batch_of(transformer, (level,), run))
        counted += count_macs(transformer, lambda both=both: predict(transformer, both))  # type: ignore[misc]
    output = predict(transformer, both)
    cost = diffratio.macs(transformer, run=run)
    uncounted = cost.planning if isinstance(state.token_method, RoutedMethod) else 0
    assert counted == pytest.approx(cost.total - uncounted, rel=1e-3)
    assert output.isfinite().all()
    state.close_run()
    diffratio.remove_(transformer)
    assert torch.equal(predict(transformer, _both(arguments[-1])), dense)


def test_todo_meets_budgets_where_blocks_cost_unequally() -> None:
    """The first blocks have a second attention, so a factor saves more there."""
    sizes = {"num_layers": 12, "sample_size": 16, "num_attention_heads": 4, "attention_head_dim": 16}
    transformer = tiny(dual_attention_layers=tuple(range(6)), **sizes)
    run, description = run_of(TokenGrid(8, 8), text=0), SD3.describe(transformer)
    for budget in (0.97, 0.95, 0.8):
        config: Any = diffratio.for_budget("todo", transformer, budget, run=run)
        assert budget - 0.01 <= config.method(config, description).macs(run).fraction <= budget


def _both(arguments: dict[str, Any]) -> dict[str, Any]:
    """The guidance halves of a batch, the unconditional one first and without a prompt."""
    prompt = ("encoder_hidden_states", "pooled_projections")
    return {
        name: torch.cat([torch.zeros_like(value) if name in prompt else value, value])
        for name, value in arguments.items()
    }


@each_form
@pytest.mark.parametrize("blocks", [(1,), (0, 1), (2,)], ids=str)
def test_a_bypassed_block_is_an_absent_one(form: str, blocks: tuple[int, ...]) -> None:
    """Both streams go by it, also by the last block, which would have ended the text."""
    transformer, dense = tiny(form), tiny(form)
    dense.transformer_blocks = nn.ModuleList(
        block for layer, block in enumerate(dense.transformer_blocks) if layer not in blocks
    )
    diffratio.apply_(transformer, diffratio.BlockDrop(blocks=blocks))
    arguments = batch_of(transformer)
    assert torch.equal(predict(transformer, arguments), predict(dense, arguments))


@pytest.mark.parametrize(
    ("form", "changes", "close"),
    # the norm of queries and keys computes in float32, whatever it is given
    [("3", {}, 1e-12), ("3.5", {"qk_norm": None}, 1e-12), ("3.5", {}, 1e-6)],
    ids=str,
)
def test_estimators_equal_the_loop_in_values_and_gradients(form: str, changes: dict[str, Any], close: float) -> None:
    """Token sets by sample; one call with our attention, and two calls with a foreign one."""

    class Foreign(JointAttnProcessor2_0):
        """Somebody else's processor."""

    results = {}
    for name in ("loop", "grouped", "foreign"):
        transformer = learning(MIXED, "loop" if name == "loop" else "grouped", form, **changes)
        if name == "foreign":
            diffratio.remove_(transformer)
            transformer.set_attn_processor(Foreign())
            state = learning(MIXED, form=form, **changes).state_dict()
            diffratio.apply_(transformer, diffratio.DiffCR()).double().train().load_state_dict(state)
        assert attachment(transformer).owns_attention == (name == "grouped")
        loss = loss_of(transformer)
        loss.backward()
        results[name] = {"loss": loss.detach()} | {key: p.grad for key, p in transformer.named_parameters()}
    for name in ("grouped", "foreign"):
        assert results[name].keys() == results["loop"].keys()
        for key, value in results[name].items():
            torch.testing.assert_close(value, results["loop"][key], atol=close, rtol=close, msg=f"{name} {key}")
    assert (results["grouped"]["keep_ratios.rho"] != 0).all()


def test_the_ratio_gradient_of_one_pass_is_a_difference_quotient() -> None:
    """It reaches the ratio through the update and the keys, and through the text as well."""
    check_ratio_gradient(learning(MIXED, "soft"), MIXED, loss_of, atol=1e-4, rtol=5e-3)


def test_soft_in_half_precision_is_near_the_full_one() -> None:
    """Under autocast the normed queries and keys are float32 and the values are not."""
    transformer = learning([[0.73] * 4, [0.41] * 4, [0.86] * 4], "soft").float()
    batch = batch_of(transformer)
    full = predict(transformer, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = predict(transformer, batch, grad=True)
    half.float().square().sum().backward()
    assert 0 < (half.float() - full).norm() / full.norm() < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


@pytest.mark.parametrize("bin_", [1, 4, 9, 10])
def test_soft_equals_the_exact_estimator_on_a_bin(bin_: int) -> None:
    table = [[bin_ / 10] * 4] * 3
    soft, exact = learning(table, "soft"), learning(table)
    torch.testing.assert_close(loss_of(soft), loss_of(exact), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["grouped", "loop", "soft"])
def test_text_of_both_passes_is_mixed_with_the_same_weight_and_has_no_gate(estimator: str) -> None:
    table = torch.ones(3, 4)
    ratio, low, high = 0.43, 4, 5

    def text_of(transformer: Any) -> Tensor:
        """What the first block hands on."""
        seen: list[Any] = []
        method: Any = attachment(transformer).token_method
        inner = method.run_block
        method.run_block = lambda *args: (seen.append(inner(*args)), seen[-1])[1]
        loss_of(transformer)
        del method.run_block
        assert [one.text is None for one in seen] == [False, False, True]
        return seen[0].text  # type: ignore[no-any-return]

    texts = {}
    for bin_ in (low, high):
        table[0] = bin_ / 10
        fixed = learning(table.tolist(), estimator).eval()
        attachment(fixed).token_method.bins = ((bin_,) * 4, (10,) * 4, (10,) * 4)  # type: ignore[attr-defined]
        texts[bin_] = text_of(fixed)
    table[0] = ratio
    transformer = learning(table.tolist(), estimator)
    found, weight = text_of(transformer), 10 * ratio - low
    expected = torch.lerp(texts[low], texts[high], weight)
    assert (texts[low] - texts[high]).abs().max() > 1e-2
    if estimator == "soft":  # one pass, whose text lies between the two
        assert (found - expected).abs().max() < 0.1 * (texts[low] - texts[high]).abs().max()
    else:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # the weight was rounded with its ratio
    found.square().sum().backward()
    assert transformer.transformer_blocks[0].router.weight.grad is None
    assert (transformer.keep_ratios.rho.grad[0] != 0).all()


def test_a_skipped_range_keeps_the_residuals_of_both_streams() -> None:
    """Blocks 0 and 1 of the second step: what they added in the first one, to image and text."""
    from diffratio.methods.actions import Skip

    transformer, dense, run = tiny(), tiny(), run_of(steps=2)
    state = attachment(diffratio.apply_(transformer, diffratio.Dense()))
    step_of: Any = lambda step, run: Skip(0, 1) if step else None  # noqa: E731
    state.token_method.action = step_of  # type: ignore[method-assign]
    state.open_run(run)
    first, second = (batch_of(dense, (level,), run) for level in run.noise_levels)
    entered: list[dict[str, Any]] = []
    left: list[Any] = []
    blocks = dense.transformer_blocks
    blocks[0].register_forward_hook(lambda _, args, kwargs, out: entered.append(kwargs), with_kwargs=True)
    blocks[1].register_forward_hook(lambda _, args, out: left.append(out))
    assert torch.equal(predict(transformer, first), predict(dense, first))
    predict(dense, second)
    names = SD3.streams
    moved = {name: entered[1][name] + left[0][i] - entered[0][name] for i, name in enumerate(names)}
    _, image = blocks[2](**entered[1] | moved)
    expected = dense.proj_out(dense.norm_out(image, entered[1]["temb"]))
    state.step = 1
    found = SD3.per_token_output(transformer, predict(transformer, second))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    state.token_method.action = lambda step, run: Skip(1, 2) if step else None  # type: ignore
    state.open_run(run)  # the last block's range has no residual of the text
    predict(transformer, first)
    state.step = 1
    assert predict(transformer, second).isfinite().all()


def test_a_method_that_forgets_the_text_is_told() -> None:
    class Forgetful(Method):
        name = "forgetful"

        def run_block(self, layer: int, call: BlockCall, ctx: Any) -> Tensor:
            return call.x

    transformer = diffratio.apply_(tiny(), diffratio.Dense())
    state = attachment(transformer)
    state.methods[-1] = Forgetful(None, state.token_method.description)
    with pytest.raises(DiffratioError, match=r"forgetful gives image tokens of a block.*sd3 return encoder_hidden"):
        predict(transformer, batch_of(transformer))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip_layers": [1]}, "skip_layers does not go with .* sd3: .*BlockDrop"),
        ({"block_controlnet_hidden_states": [torch.zeros(1)]}, "block_controlnet_hidden_states does not go"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}}, "ip_adapter_image_embeds does not"),
        ({"hidden_states": torch.zeros(6, 1, 7, 8)}, "7x8 sample .* whole 2x2 patches"),
        ({"hidden_states": torch.zeros(6, 1, 32, 8)}, "16x4 tokens does not fit .* 12x12"),
    ],
)
def test_arguments_that_do_not_go_with_a_method_are_refused(given: dict[str, Any], message: str) -> None:
    transformer = diffratio.apply_(tiny(), diffratio.MoD(keep=0.5))
    arguments = batch_of(transformer)
    predict(transformer, arguments | {"joint_attention_kwargs": {"scale": 1.0}})  # of a LoRA
    with pytest.raises(DiffratioError, match=message):
        predict(transformer, arguments | given)


def test_levels_are_those_of_the_pipelines_scheduler() -> None:
    transformer = tiny()
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    run = SD3.default_run(transformer, 28)
    assert run.noise_levels == pytest.approx(scheduler.sigmas[:-1].tolist())
    assert SD3.timestep(torch.tensor(run.noise_levels)).tolist() == pytest.approx(scheduler.timesteps.tolist())
    assert run.region_counts(4) == (3, 4, 7, 14)
    assert run.text_tokens == 77 + 256
    with pytest.raises(DiffratioError, match="at least 1"):
        SD3.default_run(transformer, 0)


@pytest.mark.parametrize("estimator", ["grouped", "soft"])
def test_any_aspect_ratio_is_routed_and_timed(estimator: str) -> None:
    dense, transformer, run = tiny(), tiny(), run_of(TokenGrid(3, 5), 2)
    diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator))
    arguments = batch_of(dense, run=run)
    assert torch.equal(predict(transformer, arguments), predict(dense, arguments))
    transformer.train()
    with torch.no_grad():
        transformer.keep_ratios.rho.fill_(0.45)
    fewer = predict(transformer, arguments)
    assert fewer.shape == arguments["hidden_states"].shape and fewer.isfinite().all()
    assert not torch.allclose(fewer, predict(dense, arguments), atol=1e-3)
    seen: list[tuple[int, ...]] = []
    block = transformer.eval().transformer_blocks[0]
    block.attn.add_k_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    run_call(transformer, run, 4)()
    assert seen == [(4, TEXT, 16)] * 2


def test_what_needs_class_labels_says_so() -> None:
    with pytest.raises(DiffratioError, match=r"train takes class-conditional .* sd3 is conditioned on text"):
        check_classes(tiny(), "train")
