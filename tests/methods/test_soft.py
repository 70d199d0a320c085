"""The one-pass estimator against the exact one: equal on the bins, and a fair substitute in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quotients import check_ratio_gradient
from torch import Tensor

import diffratio
from diffratio.backbones import attention as processors
from diffratio.backbones import get_backbone
from diffratio.errors import DiffratioError
from diffratio.surgery import attachment

LEVELS = (0.05, 0.3, 0.1, 0.55, 0.8, 0.95)  # regions 0 1 0 2 3 3
BETWEEN = [[0.55, 0.13, 0.98, 0.31], [0.42, 0.27, 0.91, 0.87], [0.73, 0.74, 0.76, 0.44]]
MIXED = [[0.5, 0.13, 1.0, 0.31], [0.42, 0.2, 0.91, 0.1], [0.7, 0.74, 0.7, 0.45]]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def learning(table: Any, estimator: str = "soft", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A tiny transformer in training, with its ratios at a table [layer][region] or at one value."""
    torch.manual_seed(seed)
    transformer: Any = get_backbone("dit").tiny()
    diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator)).to(dtype).train()
    with torch.no_grad():
        transformer.keep_ratios.rho.copy_(torch.as_tensor(table, dtype=torch.float64))
        for block in transformer.transformer_blocks:
            block.router.weight.mul_(20)  # gates away from one half
    return transformer


def output_of(transformer: Any, samples: slice = slice(None)) -> Tensor:
    dtype = next(transformer.parameters()).dtype
    noise = torch.randn(len(LEVELS), 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timestep = torch.tensor([1000 * level for level in LEVELS])
    batch = (noise.to(dtype)[samples], timestep[samples], torch.arange(len(LEVELS))[samples])
    return transformer(*batch, return_dict=False)[0]  # type: ignore[no-any-return]


def loss_of(transformer: Any) -> Tensor:
    output = output_of(transformer)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (output - target.to(output.dtype)).square().mean()


def rounded(bin_: int, dtype: torch.dtype) -> Tensor:
    """What the integer table of one bin gives."""
    transformer = learning(0.5, dtype=dtype).eval()
    method: Any = attachment(transformer).token_method
    method.bins = ((bin_,) * 4,) * 3
    return output_of(transformer)


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("bin_", range(1, 11))
def test_equals_the_exact_estimator_on_every_bin(bin_: int, dtype: torch.dtype) -> None:
    soft, exact = learning(bin_ / 10, dtype=dtype), learning(bin_ / 10, "grouped", dtype)
    close: dict[str, Any] = {"atol": EXACT[dtype], "rtol": 10 * EXACT[dtype]}
    torch.testing.assert_close(output_of(soft), output_of(exact), **close)
    torch.testing.assert_close(output_of(soft), rounded(bin_, dtype), **close)


@pytest.mark.parametrize("bin_", range(1, 10))
def test_tends_to_the_lower_bin(bin_: int) -> None:
    """Just above a bin the extra tokens hardly count; the distance falls with the weight, to nothing."""
    expected = rounded(bin_, torch.float64)
    distances = []
    for above in (4e-3, 4e-4, 4e-5):
        distances.append((output_of(learning(bin_ / 10 + above)) - expected).abs().max().item())
    assert distances[0] < 1 and distances[1] < 0.2 * distances[0] and distances[2] < 0.2 * distances[1]
    assert 0 < distances[2] < 5e-3


def test_the_weight_enters_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the bias the extra tokens are full keys of the others however little they count themselves."""
    expected, found = rounded(3, torch.float64), output_of(learning(0.3 + 2e-5))
    assert (found - expected).abs().max() < 1e-2

    def unbiased(attn: Any, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        return plain(attn, queries, keys, 0 * bias)

    plain = processors._biased
    monkeypatch.setattr(processors, "_biased", unbiased)
    assert (output_of(learning(0.3 + 2e-5)) - expected).abs().max() > 0.1


@pytest.mark.parametrize("table", [BETWEEN, MIXED], ids=["between", "mixed"])
def test_the_ratio_gradient_is_its_own_difference_quotient(table: list[list[float]]) -> None:
    """Through the update and through the keys; on a bin from below, at the lowest ratio from above."""
    check_ratio_gradient(learning(table), table, loss_of, atol=1e-4, rtol=5e-3)


def test_it_pulls_the_ratios_where_the_exact_one_does() -> None:
    """Not in every cell of a random model: it is an approximation between the bins."""
    gradients: dict[str, list[Tensor]] = {"soft": [], "grouped": []}
    for seed in range(4):
        for estimator, found in gradients.items():
            transformer = learning(BETWEEN, estimator, seed=seed)
            loss_of(transformer).backward()
            found.append(transformer.keep_ratios.rho.grad.flatten())
    soft, exact = torch.cat(gradients["soft"]), torch.cat(gradients["grouped"])
    assert torch.cosine_similarity(soft, exact, dim=0) > 0.85
    assert (soft * exact > 0).float().mean() > 0.85
    assert 0.8 < (soft / exact).median() < 1.1


def test_between_two_bins_it_goes_steadily_from_one_to_the_other() -> None:
    """One block alone: no jump, and ever further from the lower bin and nearer to the upper one."""
    table = torch.ones(3, 4, dtype=torch.float64)
    outputs = []
    for step in range(21):
        table[1] = 0.5 + step / 200
        outputs.append(output_of(learning(table)))
    steps = [(b - a).norm().item() for a, b in zip(outputs, outputs[1:], strict=False)]
    away = [(one - outputs[0]).norm().item() for one in outputs]
    left = [(one - outputs[-1]).norm().item() for one in outputs]
    assert away == sorted(away) and left == sorted(left, reverse=True)
    assert max(steps[1:]) < 0.2 * away[-1]
    assert away[-1] > 0.1


def test_samples_do_not_depend_on_their_batch() -> None:
    transformer = learning(MIXED, dtype=torch.float32)
    together = output_of(transformer)
    for sample in range(len(LEVELS)):
        alone = output_of(transformer, slice(sample, sample + 1))
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_foreign_attention_processor_is_refused_where_the_exact_estimator_goes_on() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    outputs = []
    for estimator in ("grouped", "loop"):
        torch.manual_seed(0)
        transformer: Any = get_backbone("dit").tiny().double()
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
        with pytest.raises(DiffratioError, match="the attention processor is AttnProcessor"):
            diffratio.apply_(transformer, diffratio.DiffCR(estimator="soft"))
        diffratio.apply_(transformer, diffratio.DiffCR(estimator=estimator)).train()
        assert not attachment(transformer).owns_attention
        with torch.no_grad():
            transformer.keep_ratios.rho.copy_(torch.tensor(MIXED))
        outputs.append(output_of(transformer))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=1e-12)


def test_a_fixed_schedule_needs_no_processors_of_ours() -> None:
    transformer: Any = get_backbone("dit").tiny()
    run = get_backbone("dit").default_run(transformer, 8)
    schedule = diffratio.KeepSchedule(((5,) * 4,) * 3, run, 0.9)
    diffratio.apply_(transformer, diffratio.DiffCR(schedule, estimator="soft"))
    assert not attachment(transformer).owns_attention
