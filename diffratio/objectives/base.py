"""The objective contract and its members."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffratio.errors import DiffratioError, unknown


@dataclass(frozen=True)
class Noised:
    """A noised batch.

    Args:
        inputs: what the model sees (B, C, H, W).
        target: what it should predict (B, C, H, W).
        clean: the clean images.
        noise_levels: u of each sample (B,).
        where: pixels whose error counts (B, 1, H, W), 1 or 0; None counts all.
    """

    inputs: Tensor
    target: Tensor
    clean: Tensor
    noise_levels: Tensor
    where: Tensor | None = None


class Objective(ABC):
    """How images are noised, at which levels, and what is predicted."""

    name: ClassVar[str]

    @abstractmethod
    def quantile(self, mass: Tensor) -> Tensor:
        """Inverse cumulative density of the training noise levels: (0, 1) -> u in [0, 1]."""

    @abstractmethod
    def cumulative(self, level: float) -> float:
        """Cumulative density of the training noise levels at u."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """Mixes noise into clean images at the given levels (B,)."""

    @abstractmethod
    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Loss of each sample (B,), in fp32."""

    def distance(self, output: Tensor, taught: Tensor, noised: Noised) -> Tensor:
        """How far an output lies from a teacher's, in the units of the loss, (B,) in fp32."""
        channels = noised.clean.shape[1]
        return _mean_square(self.prediction(output, channels), self.prediction(taught, channels), noised.where)

    def error_weights(self, levels: Tensor) -> Tensor:
        """What the loss multiplies the mean square error of an output by, at noise levels (B,)."""
        return torch.ones_like(levels, dtype=torch.float32)

    def timestep(self, timestep: Tensor) -> Tensor:
        """A backbone's timestep input (B,) in the form that this objective trains on."""
        return timestep

    def prediction(self, output: Tensor, channels: int) -> Tensor:
        """The part of an output that is compared and distilled: learned variance is left out."""
        return output[:, :channels]


def _mean(values: Tensor, where: Tensor | None) -> Tensor:
    """Mean of (B, C, H, W) over the pixels that count, (B,); 0 where none does."""
    if where is None:
        return values.flatten(1).mean(1)
    counted = where.to(values.dtype).expand_as(values)
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def _mean_square(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    return _mean((a.float() - b.float()).square(), where)


class FlowMatching(Objective):
    """Rectified flow: x_u = (1 - u) x_0 + u e, the model predicts e - x_0 (arXiv 2209.03003, 2403.03206).

    Args:
        levels: `logit_normal` (standard) or `uniform` training noise levels.
    """

    name = "flow"

    def __init__(self, levels: str = "logit_normal") -> None:
        if levels not in ("logit_normal", "uniform"):
            raise unknown("objective.levels", levels, ("logit_normal", "uniform"))
        self.levels = levels

    def quantile(self, mass: Tensor) -> Tensor:
        """Sigmoid of a normal quantile, or the mass itself."""
        return torch.sigmoid(torch.special.ndtri(mass)) if self.levels == "logit_normal" else mass

    def cumulative(self, level: float) -> float:
        """Inverse of `quantile`."""
        if self.levels == "uniform" or level in (0.0, 1.0):
            return level
        return 0.5 * (1 + math.erf(math.log(level / (1 - level)) / math.sqrt(2)))

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """Linear interpolation."""
        u = levels[:, None, None, None].to(clean.dtype)
        return Noised((1 - u) * clean + u * noise, noise - clean, clean, levels)

    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Mean square error."""
        return _mean_square(output, noised.target, noised.where)


class FlowSample(FlowMatching):
    """Rectified flow whose model predicts the clean image x_0; the loss is the velocity's (arXiv 2511.13720).

    For pixels in large patches: a velocity holds all the noise of a patch, which a model that is hardly wider than the
    patch has channels cannot carry, and the clean image is far simpler. (x_u - x_0) / u is the velocity, so the error
    of x_0 counts 1 / u^2, with u at least 0.05.

    Args:
        levels: `logit_normal` (standard) or `uniform` training noise levels.
    """

    name = "flow_sample"
    lowest = 0.05

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """Linear interpolation; the target is the clean image."""
        mixed = super().noised(clean, noise, levels)
        return Noised(mixed.inputs, clean, clean, levels)

    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Mean square error of the velocity."""
        return super().losses(output, noised) * self.error_weights(noised.noise_levels)

    def distance(self, output: Tensor, taught: Tensor, noised: Noised) -> Tensor:
        """Mean square distance of the velocities."""
        return super().distance(output, taught, noised) * self.error_weights(noised.noise_levels)

    def error_weights(self, levels: Tensor) -> Tensor:
        """1 / u^2."""
        return levels.float().clamp_min(self.lowest).square().reciprocal()


class NoisePrediction(Objective):
    """DDPM noise prediction on the linear schedule of 1000 steps (arXiv 2006.11239), as DiT was trained.

    Where the model has twice the input channels, the second half is the learned variance and its variational bound is
    added with weight 1/1000 and without gradient to the mean (arXiv 2102.09672, section 3.1).

    Args:
        variance_weight: weight of the bound.
    """

    name = "noise"
    steps = 1000

    def __init__(self, variance_weight: float = 1e-3) -> None:
        self.variance_weight = variance_weight
        betas = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        self.betas = betas
        self.alphas_bar = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])
        self.posterior = betas * (1 - before) / (1 - self.alphas_bar)
        self.posterior_log = torch.log(torch.cat([self.posterior[1:2], self.posterior[1:]]))
        self.mean_clean = betas * before.sqrt() / (1 - self.alphas_bar)
        self.mean_noisy = (1 - before) * (1 - betas).sqrt() / (1 - self.alphas_bar)

    def quantile(self, mass: Tensor) -> Tensor:
        """Uniform over the 1000 timesteps."""
        return (mass * self.steps).floor().clamp(0, self.steps - 1) / self.steps

    def cumulative(self, level: float) -> float:
        """Uniform."""
        return level

    def timestep(self, timestep: Tensor) -> Tensor:
        """Whole steps 0..999."""
        return timestep.round().clamp(max=self.steps - 1).long()

    def _at(self, values: Tensor, levels: Tensor) -> Tensor:
        index = (levels.double() * self.steps).round().long().clamp(0, self.steps - 1)
        return values.to(levels.device)[index].float()[:, None, None, None]

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """sqrt(a) x_0 + sqrt(1 - a) e."""
        kept = self._at(self.alphas_bar, levels)
        return Noised(kept.sqrt() * clean + (1 - kept).sqrt() * noise, noise, clean, levels)

    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Mean square error of the noise, plus the bound on the variance where it is learned."""
        channels = noised.target.shape[1]
        losses = _mean_square(output[:, :channels], noised.target, noised.where)
        if output.shape[1] == channels:
            return losses
        if output.shape[1] != 2 * channels:
            raise DiffratioError(
                f"the model gives {output.shape[1]} channels for {channels}: expected {channels}, "
                f"or {2 * channels} with learned variance"
            )
        return losses + self.variance_weight * self.steps * self._bound(output.float(), noised, channels)

    def _bound(self, output: Tensor, noised: Noised, channels: int) -> Tensor:
        """KL of the true posterior from the predicted one in bits per dimension; at t = 0 the Gaussian likelihood."""
        levels, x = noised.noise_levels, noised.inputs.float()
        noise, fraction = output[:, :channels].detach(), (output[:, channels:] + 1) / 2
        low, high = self._at(self.posterior_log, levels), self._at(self.betas.log(), levels)
        log_variance = fraction * high + (1 - fraction) * low
        kept = self._at(self.alphas_bar, levels)
        clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
        to_clean, to_noisy = self._at(self.mean_clean, levels), self._at(self.mean_noisy, levels)
        mean = to_clean * clean + to_noisy * x
        true_mean = to_clean * noised.clean.float() + to_noisy * x
        distance = (true_mean - mean).square()
        divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance * (-log_variance).exp())
        likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + (noised.clean - mean).square() / log_variance.exp())
        first = (levels * self.steps).round()[:, None, None, None] == 0
        return _mean(torch.where(first, likelihood, divergence), noised.where) / math.log(2)


_OBJECTIVES = {"flow": FlowMatching, "flow_sample": FlowSample, "noise": NoisePrediction}


def objectives() -> tuple[str, ...]:
    """Known names."""
    return tuple(_OBJECTIVES)


def get_objective(name: str, **options: object) -> Objective:
    """The objective of that name.

    Raises:
        DiffratioError: unknown name or option.
    """
    if name not in _OBJECTIVES:
        raise unknown("objective", name, _OBJECTIVES)
    try:
        return _OBJECTIVES[name](**options)  # type: ignore[arg-type]
    except TypeError as error:
        raise DiffratioError(f"objective {name!r}: {error}") from None
