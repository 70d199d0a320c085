"""Noising, targets, losses, and the density of the training noise levels."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffratio.errors import DiffratioError
from diffratio.objectives import FlowMatching, NoisePrediction, get_objective, objectives


def draws(n: int = 6, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, channels, 4, 4) * 2 - 1, torch.randn(n, channels, 4, 4)


def test_flow_mixes_linearly_and_predicts_the_velocity() -> None:
    clean, noise = draws()
    levels = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    noised = FlowMatching().noised(clean, noise, levels)
    assert torch.equal(noised.inputs[0], clean[0]) and torch.equal(noised.inputs[-1], noise[-1])
    u = levels[:, None, None, None]
    torch.testing.assert_close(noised.inputs - u * noised.target, clean)  # back to u = 0
    torch.testing.assert_close(noised.inputs + (1 - u) * noised.target, noise)  # on to u = 1
    torch.testing.assert_close(FlowMatching().losses(noised.target, noised), torch.zeros(6))


def test_noise_prediction_is_the_ddpm_of_diffusers() -> None:
    clean, noise = draws()
    steps = torch.tensor([0, 1, 10, 500, 998, 999])
    noised = NoisePrediction().noised(clean, noise, steps / 1000)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    expected = scheduler.add_noise(clean, noise, steps)  # type: ignore[arg-type]
    torch.testing.assert_close(noised.inputs, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(noised.target, noise)
    torch.testing.assert_close(NoisePrediction().losses(noise, noised), torch.zeros(6))


def test_losses_are_per_sample_means_in_fp32() -> None:
    clean, noise = draws()
    for name in objectives():
        objective = get_objective(name)
        noised = objective.noised(clean, noise, torch.full((6,), 0.5))
        losses = objective.losses((noised.target + 3).to(torch.bfloat16), noised)
        assert losses.dtype == torch.float32 and losses.shape == (6,)
        expected = 36.0 if name == "flow_sample" else 9.0  # over u^2
        torch.testing.assert_close(losses, torch.full((6,), expected), rtol=0.02, atol=0.0)


def test_flow_sample_predicts_the_clean_image_and_counts_the_velocity() -> None:
    """A wrong image is a wrong velocity (x_u - x) / u; below u = 0.05 the division stops growing."""
    clean, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    levels = torch.tensor([0.01, 0.2, 0.9])
    objective, flow = get_objective("flow_sample"), FlowMatching()
    noised = objective.noised(clean, noise, levels)
    assert torch.equal(noised.inputs, flow.noised(clean, noise, levels).inputs) and torch.equal(noised.target, clean)
    guess = clean + 0.1 * torch.randn_like(clean)
    found = objective.losses(guess, noised)
    u = levels[:, None, None, None]
    velocities = flow.losses((noised.inputs - guess) / u, flow.noised(clean, noise, levels))
    assert torch.allclose(found[1:], velocities[1:], rtol=1e-4)
    assert found[0] == pytest.approx(float(velocities[0]) * (0.01 / 0.05) ** 2, rel=1e-3)
    assert torch.allclose(objective.distance(guess, clean, noised), found)
    assert objective.cumulative(0.3) == flow.cumulative(0.3)


@pytest.mark.parametrize("t", [1, 2, 37, 500, 999])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_variance_bound_is_the_kl_of_the_posterior(t: int, fraction: float) -> None:
    """Oracle in float64 from the definition of q(x_{t-1} | x_t, x_0), with the predicted noise off the truth."""
    clean, noise = draws(3)
    predicted = noise + 0.3 * torch.randn_like(noise)
    objective = NoisePrediction()
    noised = objective.noised(clean, noise, torch.full((3,), t / 1000))
    channels = torch.full_like(clean, 2 * fraction - 1)
    found = objective.losses(torch.cat([predicted, channels], 1), noised) - objective.losses(predicted, noised)

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    beta, bar, before = float(betas[t]), float(bars[t]), float(bars[t - 1])
    variance = beta * (1 - before) / (1 - bar)
    x = noised.inputs.double()

    def mean(x_0: torch.Tensor) -> torch.Tensor:
        return (math.sqrt(before) * beta * x_0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)

    guess = (x - math.sqrt(1 - bar) * predicted.double()) / math.sqrt(bar)
    modelled = math.exp(fraction * math.log(beta) + (1 - fraction) * math.log(variance))
    truth = Normal(mean(clean.double()), math.sqrt(variance))
    expected = kl_divergence(truth, Normal(mean(guess), math.sqrt(modelled))).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-5)


def test_bound_is_finite_and_teaches_the_variance_alone() -> None:
    clean, noise = draws(8, channels=1)
    levels = torch.tensor([0.0, 0.001, 0.002, 0.25, 0.5, 0.75, 0.998, 0.999])
    objective, weightless = NoisePrediction(), NoisePrediction(variance_weight=0.0)
    noised = objective.noised(clean, noise, levels)
    output = torch.randn(8, 2, 4, 4, requires_grad=True)
    objective.losses(output, noised).sum().backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()
    variance = output.grad[:, 1:]
    assert (variance.flatten(1).abs().sum(1) > 0).all()  # every level teaches it, t = 0 too
    mean = output.detach()[:, :1].requires_grad_()
    weightless.losses(mean, noised).sum().backward()
    torch.testing.assert_close(output.grad[:, :1], mean.grad)  # none of the bound


def test_variance_that_fits_costs_less() -> None:
    """Lowest where the modelled variance is the true one (fraction 0) if the mean is exact."""
    clean, noise = draws(4, channels=1)
    objective = NoisePrediction()
    noised = objective.noised(clean, noise, torch.full((4,), 0.01))
    losses = [
        float(objective.losses(torch.cat([noise, torch.full_like(noise, value)], 1), noised).mean())
        for value in (-1.0, 0.0, 1.0)
    ]
    assert losses == sorted(losses) and losses[0] == pytest.approx(0, abs=1e-6) and losses[2] > 1e-3


def test_wrong_number_of_channels_is_an_error() -> None:
    clean, noise = draws(2, channels=1)
    noised = NoisePrediction().noised(clean, noise, torch.full((2,), 0.5))
    with pytest.raises(DiffratioError, match="3 channels for 1: expected 1, or 2 with learned variance"):
        NoisePrediction().losses(torch.zeros(2, 3, 4, 4), noised)


@pytest.mark.parametrize("objective", [FlowMatching(), FlowMatching(levels="uniform")])
def test_cumulative_inverts_quantile(objective: FlowMatching) -> None:
    mass = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    levels = objective.quantile(mass)
    assert ((levels >= 0) & (levels <= 1)).all() and (levels.diff() > 0).all()
    back = [objective.cumulative(float(level)) for level in levels]
    torch.testing.assert_close(torch.tensor(back, dtype=torch.float64), mass)
    assert (objective.cumulative(0.0), objective.cumulative(1.0)) == (0.0, 1.0)


def test_noise_levels_of_noise_prediction_are_the_timesteps() -> None:
    objective = NoisePrediction()
    levels = objective.quantile((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert torch.equal((levels * 1000).round().long(), torch.arange(1000))
    assert float(objective.quantile(torch.tensor(1 - 1e-9, dtype=torch.float64))) == 0.999
    for mass in (0.0, 0.25, 0.5, 1.0):
        assert objective.cumulative(mass) == mass


def test_unknown_names_and_options() -> None:
    with pytest.raises(DiffratioError, match="unknown objective 'flows': did you mean flow"):
        get_objective("flows")
    with pytest.raises(DiffratioError, match="objective 'flow': .*variance_weight"):
        get_objective("flow", variance_weight=1.0)
    with pytest.raises(DiffratioError, match="did you mean uniform"):
        get_objective("flow", levels="unifrom")
