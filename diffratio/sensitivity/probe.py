"""Resumes a transformer's forward from a stored block input with one cell changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import image_channels
from diffratio.cost.macs import Description
from diffratio.cost.run import StepContext
from diffratio.methods.base import BlockCall, Method
from diffratio.methods.fixed import FixedConfig, FixedMethod
from diffratio.methods.streams import Result
from diffratio.surgery import apply_, attachment, remove_


@dataclass(frozen=True)
class Batch:
    """Fixed samples of one region.

    Args:
        inputs: noised images (B, C, H, W).
        timestep: the model's timestep input (B,).
        condition: the transformer's arguments that the conditions stand for, with one entry a sample.
        weights: what the loss multiplies a sample's mean square error by (B,); None is 1.
    """

    inputs: Tensor
    timestep: Tensor
    condition: Mapping[str, Tensor]
    weights: Tensor | None = None

    def weighed(self, output: Tensor) -> Tensor:
        """Outputs (B, ...) scaled so that their mean square changes count as the loss counts them."""
        if self.weights is None:
            return output
        return output * self.weights.sqrt().reshape(-1, *[1] * (output.ndim - 1))


class Network(Protocol):
    """What a map is measured on: blocks in a row, each at some bin."""

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        ...

    def trace(self, batch: Batch, bins: Sequence[int]) -> Tensor:
        """Runs one bin for each block, keeps every block's input and returns the output (B, ...)."""
        ...

    def resume(self, layer: int, bin_: int) -> Tensor:
        """The output of the last trace with one block at another bin, run from that block's stored input on."""
        ...


@dataclass(frozen=True)
class _ProbeConfig(FixedConfig):
    @property
    def method(self) -> type[Method]:
        """Not in the registry: it is no method to choose."""
        return _ProbeMethod


class _ProbeMethod(FixedMethod):
    """Runs given bins whatever the region, and skips to a stored block input."""

    name = "sensitivity probe"
    config_class = _ProbeConfig
    learned = False
    column: tuple[int, ...] = ()
    start: int | None = None
    changed = 10

    def __init__(self, config: _ProbeConfig, description: Description) -> None:
        super().__init__(config, description)
        self.stored: list[Result] = []

    def run_block(self, layer: int, call: BlockCall, ctx: StepContext) -> Result:
        """Stores inputs in a trace; in a resumed forward the blocks before the changed one cost nothing."""
        if self.start is None:
            self.stored.append(call.entering)
            return self.run_bin(layer, call, self.column[layer])
        if layer < self.start:
            return self.stored[self.start]
        return self.run_bin(layer, call, self.changed if layer == self.start else self.column[layer])


class TransformerNetwork:
    """A dense transformer as a network of cells; made by `probed`."""

    def __init__(self, transformer: nn.Module, channels: int) -> None:
        method = attachment(transformer).token_method
        assert isinstance(method, _ProbeMethod)
        self.transformer, self.channels, self.method = transformer, channels, method
        self.backbone = backbone_of(transformer)
        self.batch: Batch | None = None

    @property
    def layers(self) -> int:
        """Number of blocks L."""
        return self.method.description.layers

    @torch.no_grad()
    def trace(self, batch: Batch, bins: Sequence[int]) -> Tensor:
        """The output (B, C, H, W) at one bin a block."""
        self.batch, self.method.column, self.method.start = batch, tuple(bins), None
        self.method.stored = []
        return self._forward()

    @torch.no_grad()
    def resume(self, layer: int, bin_: int) -> Tensor:
        """The output with one block changed."""
        self.method.start, self.method.changed = layer, bin_
        return self._forward()

    def _forward(self) -> Tensor:
        assert self.batch is not None
        batch = self.batch
        output = self.backbone.predict(self.transformer, batch.inputs, batch.timestep, batch.condition)
        return batch.weighed(output[:, : self.channels].float())  # learned variance is left out


@contextlib.contextmanager
def probed(transformer: nn.Module, ranking: str, seed: int = 0) -> Iterator[TransformerNetwork]:
    """The transformer as a network of cells; it is put back afterwards, exactly.

    Args:
        transformer: dense, nothing applied.
        ranking: training-free ranking of the tokens; see `methods.fixed.RANKINGS`.
        seed: of random rankings.

    Raises:
        DiffratioError: something is applied to it.
    """
    was = transformer.training
    apply_(transformer, _ProbeConfig(ranking=ranking), seed=seed)
    try:
        transformer.eval()
        channels = image_channels(transformer)
        yield TransformerNetwork(transformer, channels)
    finally:
        remove_(transformer)
        transformer.train(was)
