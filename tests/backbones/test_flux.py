"""FLUX: double and single blocks, of which image tokens alone are routed, each turned to its own place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quotients import check_ratio_gradient
from torch import Tensor, nn

import diffratio
from diffratio.backbones import get_backbone
from diffratio.backbones.flux import image_ids
from diffratio.cost.count import count_macs
from diffratio.cost.run import SamplingRun, uniform_run
from diffratio.errors import BudgetUnreachable, DiffratioError
from diffratio.methods import get_method, methods
from diffratio.methods.routed import RoutedMethod
from diffratio.surgery import attachment, run_call
from diffratio.tokens.grid import TokenGrid

FLUX = get_backbone("flux")
DEV = {"guidance_embeds": True}  # of 19 double and 38 single blocks, 24 heads of 128 channels
LEVELS = (0.05, 0.3, 0.1, 0.55, 0.8, 0.95)  # regions 0 1 0 2 3 3
# none at bin 10: of whole sequences the stock processor turns float64 queries and keys in float32
MIXED = [[0.5, 0.13, 0.83, 0.31], [0.42, 0.2, 0.86, 0.1], [0.7, 0.74, 0.7, 0.45]]
TEXT, GRID = 5, TokenGrid(4, 4)
SHARED = ("img_ids", "txt_ids")
GUIDED = [name for name in methods() if get_method(name).needs_guidance]
PAIRED = [*GUIDED, "importance"]  # which has words of its own


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return FLUX.tiny(**changes).eval()


def run_of(grid: TokenGrid = GRID, steps: int = 1, text: int = TEXT) -> SamplingRun:
    return uniform_run(steps, grid, "none", text)


def batch_of(transformer: nn.Module, levels: tuple[float, ...] = LEVELS, run: SamplingRun | None = None) -> Any:
    arguments = FLUX.example(transformer, len(levels), run=run or run_of())
    return arguments | {"timestep": FLUX.timestep(torch.tensor(levels))}


def predict(transformer: Any, arguments: dict[str, Any], grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        output = transformer(**arguments, return_dict=False)[0]
    assert isinstance(output, Tensor)
    return output


def learning(table: Any, estimator: str = "grouped") -> Any:
    """In training, with the ratios at a table [layer][region]."""
    transformer = tiny()
    diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator)).double().train()
    with torch.no_grad():
        transformer.keep_ratios.rho.copy_(torch.tensor(table, dtype=torch.float64))
        for block in FLUX.blocks(transformer):
            block.router.weight.mul_(20)  # type: ignore[operator, union-attr]  # gates away from one half
    return transformer


def loss_of(transformer: Any) -> Tensor:
    batch = {name: value if name in SHARED else value.double() for name, value in batch_of(transformer).items()}
    output = predict(transformer, batch, grad=True)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (output - target).square().mean()


@pytest.mark.parametrize(
    ("changes", "grid", "text"),
    [
        ({}, TokenGrid(4, 4), 1),
        ({"guidance_embeds": False}, TokenGrid(2, 5), 33),
        ({"num_layers": 2, "num_single_layers": 1, "in_channels": 8, "joint_attention_dim": 20}, TokenGrid(3, 3), 7),
        ({"num_attention_heads": 3, "num_single_layers": 0, "pooled_projection_dim": 9}, TokenGrid(4, 4), 5),
    ],
    ids=str,
)
def test_dense_macs_follow_configuration_grid_and_text(changes: dict[str, Any], grid: TokenGrid, text: int) -> None:
    transformer, run = tiny(**changes), run_of(grid, text=text)
    arguments = batch_of(transformer, (0.5,), run)
    counted = count_macs(transformer, lambda: predict(transformer, arguments))
    assert counted == diffratio.macs(transformer, run=run).total


@pytest.mark.slow
def test_the_published_dev_model_on_the_meta_device() -> None:
    """11.9 B parameters; its forward at 1024 x 1024 is counted without computing it."""
    with torch.device("meta"):
        transformer: Any = FLUX.from_config(DEV)
        run = FLUX.default_run(transformer, 1)
        assert (run.grid, run.text_tokens, run.guidance) == (TokenGrid(64, 64), 512, "none")
        arguments = FLUX.example(transformer, 1, run=run) | {"timestep": torch.empty(1)}
        counted = count_macs(transformer, lambda: transformer(**{k: v.to("meta") for k, v in arguments.items()}))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
    assert counted == diffratio.macs(transformer, run=run).total


@pytest.mark.parametrize("name", [name for name in methods() if name not in PAIRED and get_method(name).static])
def test_every_method_runs_and_costs_what_is_counted(name: str) -> None:
    transformer, run = tiny(num_layers=2, token_side=8), run_of(TokenGrid(8, 8), 4)
    budget = 0.75 if name == "fewer_steps" else 0.77  # whole steps
    try:
        config: Any = diffratio.for_budget(name, transformer, budget, run=run)
        assert budget - 0.01 <= config.method(config, FLUX.describe(transformer)).macs(run).fraction <= budget
    except BudgetUnreachable:
        schedule = diffratio.KeepSchedule(((10, 3), (4, 7), (5, 0), (10, 6)), run, 0.77)
        config = {
            "block_cache": diffratio.BlockCache(),  # whole blocks of whole steps
            "dense": diffratio.Dense(),
            "diffcr": diffratio.DiffCR(schedule),
            "measured": diffratio.Measured(schedule),
            "todo": diffratio.ToDo(factor=2),
            "sdtm": diffratio.SDTM(),
        }[name]
    arguments = [batch_of(transformer, (level,), run) for level in run.noise_levels]
    dense = predict(transformer, arguments[-1])
    state = attachment(diffratio.apply_(transformer, config))
    evaluated, counted = state.adapt(run), 0
    state.open_run(evaluated)
    for step, level in enumerate(evaluated.noise_levels):
        state.step = step
        batch = batch_of(transformer, (level,), run)
        counted += count_macs(transformer, lambda batch=batch: predict(transformer, batch))  # type: ignore[misc]
    output, cost = predict(transformer, batch), diffratio.macs(transformer, run=run)
    uncounted = cost.planning if isinstance(state.token_method, RoutedMethod) else 0
    assert counted == pytest.approx(cost.total - uncounted, rel=1e-3)
    assert (cost.fraction < 1) == (name != "dense")
    assert output.isfinite().all()
    state.close_run()
    diffratio.remove_(transformer)
    assert torch.equal(predict(transformer, arguments[-1]), dense)


@pytest.mark.parametrize("name", PAIRED)
def test_methods_of_the_guidance_halves_say_that_there_are_none(name: str) -> None:
    transformer = tiny()
    with pytest.raises(DiffratioError, match="this run has guidance 'none'|compares the two guidance halves"):
        diffratio.for_budget(name, transformer, 0.9)
    config: Any = get_method(name).config_class()
    state = attachment(diffratio.apply_(transformer, config))
    state.open_run(run_of())
    match = "pipelines of flux have none by default" if name in GUIDED else "compares the two guidance halves"
    with pytest.raises(DiffratioError, match=match):
        predict(transformer, batch_of(transformer))


@pytest.mark.parametrize(
    ("layer", "sites", "changes"),
    [(0, ("feed_forward",), True), (1, ("feed_forward",), False), (1, ("self_attention",), True)],
    ids=str,
)
def test_single_blocks_have_attention_and_no_feed_forward(layer: int, sites: tuple[str, ...], changes: bool) -> None:
    dense, transformer = tiny(), tiny()
    diffratio.apply_(transformer, diffratio.ToMe(ratio=0.5, sites=sites, layers=(layer,)))
    batch = batch_of(dense)
    assert torch.equal(predict(transformer, batch), predict(dense, batch)) != changes
    with pytest.raises(DiffratioError, match="flux has no site 'cross_attention'"):
        diffratio.apply_(tiny(), diffratio.ToMe(ratio=0.5, sites=("cross_attention",)))


@pytest.mark.parametrize("layer", [0, 1])
def test_merged_tokens_of_attention_stand_at_their_representatives_place(layer: int) -> None:
    """By hand: the group means, turned as the representatives, beside the whole text, and copied back."""
    transformer = tiny()
    diffratio.apply_(transformer, diffratio.ToMe(ratio=0.5, layers=(layer,), random=False))
    method: Any = attachment(transformer).token_method
    seen: list[Any] = []
    attn = FLUX.blocks(transformer)[layer].attn
    attn.register_forward_hook(lambda _, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    predict(transformer, batch_of(transformer))
    plan, (given, output) = method.present, seen[0]
    assert plan is not None and plan.kept < GRID.tokens
    x, double = given["hidden_states"], given.get("encoder_hidden_states") is not None
    text = given["encoder_hidden_states"] if double else x[:, :TEXT]
    merged = plan.reduce(x if double else x[:, TEXT:])
    plain = tiny()
    own = FLUX.blocks(plain)[layer].attn
    for i in range(len(LEVELS)):
        rows = torch.cat([torch.arange(TEXT), TEXT + plan.index[i]])
        rotary = tuple(one[rows] for one in given["image_rotary_emb"])
        one, words = merged[i : i + 1], text[i : i + 1]
        with torch.no_grad():
            if double:
                image, expected = own(one, words, image_rotary_emb=rotary)
                torch.testing.assert_close(output[1][i : i + 1], expected, atol=1e-6, rtol=1e-5)
                found = output[0]
            else:
                both = own(torch.cat([words, one], dim=1), image_rotary_emb=rotary)
                image, found = both[:, TEXT:], output[:, TEXT:]
                torch.testing.assert_close(output[i : i + 1, :TEXT], both[:, :TEXT], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[i], image[0, plan.slots[i]], atol=1e-6, rtol=1e-5)


def test_kept_tokens_are_turned_to_their_own_places() -> None:
    """A block on a token set by sample is the stock block on a sequence of those tokens, sample by sample."""
    dense, transformer = tiny(), tiny()
    diffratio.apply_(transformer, diffratio.MoD(keep=0.4))
    method: Any = attachment(transformer).token_method
    method.kept_index = []
    entering: list[Any] = []
    leaving: list[Any] = []
    for block in FLUX.blocks(transformer):
        block.register_forward_hook(lambda _, args, kwargs, out: entering.append(kwargs), with_kwargs=True)
        block.register_forward_hook(lambda _, args, out: leaving.append(out))
    predict(transformer, batch_of(transformer))
    assert len({tuple(row) for row in method.kept_index[0].tolist()}) > 1
    for layer, block in enumerate(FLUX.blocks(dense)):
        index, given = method.kept_index[layer], entering[layer]
        for i in range(len(LEVELS)):
            rows = torch.cat([torch.arange(TEXT), TEXT + index[i]])
            x = given["hidden_states"][i : i + 1]
            with torch.no_grad():
                text, image = block(
                    hidden_states=x[:, index[i]],
                    encoder_hidden_states=given["encoder_hidden_states"][i : i + 1],
                    temb=given["temb"][i : i + 1],
                    image_rotary_emb=tuple(one[rows] for one in given["image_rotary_emb"]),
                )
            expected = x.index_copy(1, index[i], image)
            torch.testing.assert_close(leaving[layer][1][i : i + 1], expected, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(leaving[layer][0][i : i + 1], text, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("blocks", [(0,), (1, 2)], ids=str)
def test_a_bypassed_block_is_an_absent_one(blocks: tuple[int, ...]) -> None:
    transformer, dense = tiny(), tiny()
    keep = [block for layer, block in enumerate(FLUX.blocks(dense)) if layer not in blocks]
    dense.transformer_blocks = nn.ModuleList(block for block in keep if hasattr(block, "ff"))
    dense.single_transformer_blocks = nn.ModuleList(block for block in keep if not hasattr(block, "ff"))
    diffratio.apply_(transformer, diffratio.BlockDrop(blocks=blocks))
    arguments = batch_of(transformer)
    assert torch.equal(predict(transformer, arguments), predict(dense, arguments))


def test_estimators_equal_the_loop_in_values_and_gradients() -> None:
    """Token sets by sample in double and single blocks, in one call of nested sets, against one at a time."""
    results = {}
    for name in ("loop", "grouped"):
        transformer = learning(MIXED, name)
        loss = loss_of(transformer)
        loss.backward()
        results[name] = {"loss": loss.detach()} | {key: p.grad for key, p in transformer.named_parameters()}
    assert results["grouped"].keys() == results["loop"].keys()
    for key, value in results["grouped"].items():
        torch.testing.assert_close(value, results["loop"][key], atol=1e-12, rtol=1e-12, msg=key)
    assert (results["grouped"]["keep_ratios.rho"] != 0).all()


def test_the_ratio_gradient_of_one_pass_is_a_difference_quotient() -> None:
    check_ratio_gradient(learning(MIXED, "soft"), MIXED, loss_of, atol=1e-4, rtol=5e-3)


@pytest.mark.parametrize("bin_", [4, 10])
def test_soft_equals_the_exact_estimator_on_a_bin(bin_: int) -> None:
    table = [[bin_ / 10] * 4] * 3
    soft, exact = learning(table, "soft"), learning(table)
    torch.testing.assert_close(loss_of(soft), loss_of(exact), atol=1e-12, rtol=1e-12)


def test_soft_in_half_precision_is_near_the_full_one() -> None:
    transformer = learning([[0.73] * 4, [0.41] * 4, [0.86] * 4], "soft").float()
    batch = batch_of(transformer)
    full = predict(transformer, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = predict(transformer, batch, grad=True)
    half.float().square().sum().backward()
    assert 0 < (half.float() - full).norm() / full.norm() < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


def test_a_skipped_range_keeps_the_residuals_across_both_kinds_of_blocks() -> None:
    from diffratio.methods.actions import Skip

    transformer, dense, run = tiny(), tiny(), run_of(steps=2)
    state = attachment(diffratio.apply_(transformer, diffratio.Dense()))
    step_of: Any = lambda step, run: Skip(0, 1) if step else None  # noqa: E731
    state.token_method.action = step_of  # type: ignore[method-assign]
    state.open_run(run)
    first, second = (batch_of(dense, (level,), run) for level in run.noise_levels)
    entered: list[dict[str, Any]] = []
    left: list[Any] = []
    blocks: Any = FLUX.blocks(dense)
    blocks[0].register_forward_hook(lambda _, args, kwargs, out: entered.append(kwargs), with_kwargs=True)
    blocks[1].register_forward_hook(lambda _, args, out: left.append(out))
    assert torch.equal(predict(transformer, first), predict(dense, first))
    predict(dense, second)
    moved = {name: entered[1][name] + left[0][i] - entered[0][name] for i, name in enumerate(FLUX.streams)}
    with torch.no_grad():
        _, image = blocks[2](**entered[1] | moved)
        expected = dense.proj_out(dense.norm_out(image, entered[1]["temb"]))
    state.step = 1
    found = FLUX.per_token_output(transformer, predict(transformer, second))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def _jumbled(ids: Tensor) -> Tensor:
    return ids[torch.arange(16).flip(0)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"controlnet_block_samples": [torch.zeros(1)]}, "controlnet_block_samples does not go with .* flux"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}}, "ip_adapter_image_embeds does not"),
        ({"joint_attention_kwargs": {"attention_mask": torch.zeros(1)}}, "attention_mask does not go"),
        ({"img_ids": None}, "flux takes its token grid from img_ids"),
        ({"img_ids": _jumbled(image_ids(GRID))}, "do not number the rows and columns of one picture"),
        ({"img_ids": torch.cat([image_ids(TokenGrid(2, 4))] * 2)}, "do not number the rows and columns"),
        ({"img_ids": image_ids(TokenGrid(2, 4))}, r"\(8, 3\) of 16 image tokens do not number"),
    ],
)
def test_arguments_that_do_not_go_with_a_method_are_refused(given: dict[str, Any], message: str) -> None:
    transformer = diffratio.apply_(tiny(), diffratio.MoD(keep=0.5))
    arguments = batch_of(transformer)
    predict(transformer, arguments | {"joint_attention_kwargs": {"scale": 1.0}})  # of a LoRA
    with pytest.raises(DiffratioError, match=message):
        predict(transformer, arguments | given)


def test_grids_of_samples_and_configurations(tmp_path: Path) -> None:
    transformer: Any = tiny(token_side=3)
    transformer.save_pretrained(tmp_path / "saved")
    folder = diffratio.export(transformer, tmp_path / "exported")
    twins = [FLUX.load(str(tmp_path / "saved")), diffratio.load_transformer(folder)]
    twins.append(FLUX.from_config(dict(transformer.config)))
    assert [FLUX.grid(one) for one in (transformer, *twins)] == [TokenGrid(3, 3)] * 4
    assert FLUX.grid(transformer, torch.empty(1, 36, 4)) == TokenGrid(6, 6)
    with pytest.raises(DiffratioError, match="35 tokens of a flux sample are no square: img_ids"):
        FLUX.grid(transformer, torch.empty(1, 35, 4))
    assert FLUX.grid(transformer, torch.empty(1, 1, 8, 6)) == TokenGrid(4, 3)
    with pytest.raises(DiffratioError, match="a 7x8 sample does not fit flux"):
        FLUX.grid(transformer, torch.empty(1, 1, 7, 8))
    with pytest.raises(DiffratioError, match=r"takes samples .* got \(8, 8\)"):
        FLUX.grid(transformer, torch.empty(8, 8))
    assert FLUX.grid(FLUX.from_config({"num_layers": 0, "num_single_layers": 0})) == TokenGrid(64, 64)
    for grid in (GRID, TokenGrid(2, 7), TokenGrid(1, 3), TokenGrid(5, 1)):
        for ids in (image_ids(grid), image_ids(grid)[None], image_ids(grid).bfloat16()):
            found = FLUX.grid_of(transformer, {"hidden_states": torch.empty(1, grid.tokens, 4), "img_ids": ids})
            assert found == grid


def test_levels_are_those_of_the_published_schedulers() -> None:
    """dev: shifted by exp(1.15) at 4096 tokens; schnell: uniform."""
    dev, schnell = tiny(token_side=64), tiny(token_side=64, guidance_embeds=False)
    run = FLUX.default_run(dev, 28)
    shift = 2.718281828**1.15
    uniform = [(28 - i) / 28 for i in range(28)]
    assert run.noise_levels == pytest.approx([shift / (shift + 1 / u - 1) for u in uniform])
    assert FLUX.scheduler_level(torch.tensor([1000.0, 250.0])).tolist() == [1.0, 0.25]
    assert FLUX.noise_level(FLUX.timestep(torch.tensor([0.3]))).tolist() == pytest.approx([0.3])
    four = FLUX.default_run(schnell, 4)
    assert four.noise_levels == pytest.approx([1, 0.75, 0.5, 0.25])
    assert (run.text_tokens, four.text_tokens, run.forwards) == (512, 256, 28)
    with pytest.raises(DiffratioError, match="at least 1"):
        FLUX.default_run(dev, 0)


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
    block: Any = FLUX.blocks(transformer.eval())[0]
    block.attn.add_k_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    run_call(transformer, run, 4)()
    assert seen == [(4, TEXT, 16)] * 2
