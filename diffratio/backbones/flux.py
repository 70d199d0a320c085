"""FLUX.1 (dev and schnell) as diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from diffratio.backbones.attention import index_attention_, plain_attention_
from diffratio.backbones.base import (
    TEXT_TOKENS,
    TIMESTEPS,
    TOKEN_SIDE,
    FromDiffusers,
    modulate_visibly_,
    patches,
    register,
)
from diffratio.backbones.rotary import RotaryAttention
from diffratio.cost.macs import BlockCost, Description, SiteCost
from diffratio.cost.run import Guidance, SamplingRun
from diffratio.errors import DiffratioError
from diffratio.tokens.grid import TokenGrid

_FREQUENCIES = 256  # sinusoidal channels that enter the timestep embedder
_TEXT_TOKENS = {True: 512, False: 256}  # of T5 in the pipelines of dev, which embeds guidance, and of schnell
_SIDE = 64  # tokens, of the pipelines' 1024 x 1024 pixels
_SHIFT = ((256, 0.5), (4096, 1.15))  # image tokens and logarithm of the shift of the noise levels, dev's two points
_GUIDANCE = 3.5  # the pipeline's default
_TRAINED = 1.0  # what the model is told while it is trained, as in diffusers' own scripts


@register
class Flux(FromDiffusers):
    """Double blocks of an image and a text stream, then single blocks in which both share all weights.

    Only image tokens are reduced; the bypass of a block bypasses both streams. A single block computes attention and
    MLP side by side and projects them out in one, so it has no site `feed_forward`: plans there leave it alone.

    The transformer sees samples by token, 2x2 latents in one; `predict` folds (B, C, H, W) and unfolds the prediction.
    The token grid is read from `img_ids`. The guidance scale is an input, so runs have no guidance halves.
    """

    name = "flux"
    transformer_class = FluxTransformer2DModel
    condition = "text"
    pipeline = "FluxPipeline"
    per_sample = ("encoder_hidden_states", "temb")
    sites = {"self_attention": "attn", "feed_forward": "ff"}
    streams = ("encoder_hidden_states", "hidden_states")
    batched = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance")
    refused = {
        "controlnet_block_samples": "its residuals belong to blocks that run in full in every step",
        "controlnet_single_block_samples": "its residuals belong to blocks that run in full in every step",
        "joint_attention_kwargs.attention_mask": "its rows are all tokens, and a method computes some of them",
        "joint_attention_kwargs.ip_adapter_image_embeds": "image embeddings of an IP adapter are not split by sample",
        "joint_attention_kwargs.ip_hidden_states": "image embeddings of an IP adapter are not split by sample",
    }
    guidance_order = "one"
    attention = "joint_attention_kwargs"
    positions = "image_rotary_emb"
    fold = 2
    objectives = ("flow", "flow_sample")  # its timestep input is the level itself

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """`transformer_blocks`, then `single_transformer_blocks`."""
        model = cast(Any, transformer)
        return nn.ModuleList([*model.transformer_blocks, *model.single_transformer_blocks])

    def site_modules(self, block: nn.Module, site: str) -> list[nn.Module]:
        """Single blocks have no feed_forward of their own."""
        return super().site_modules(block, site) if hasattr(block, self.sites[site]) else []

    def grid(self, transformer: nn.Module, sample: Tensor | None = None) -> TokenGrid:
        """The grid of a sample (B, C, H, W), the square one of a sample by token (B, N, C), or the default one.

        That is 64x64, or `_token_side` of a configuration.

        Raises:
            DiffratioError: N is no square, or a height or width is odd.
        """
        side = int(_config(transformer).get(TOKEN_SIDE, _SIDE))
        if sample is None:
            return TokenGrid(side, side)
        if sample.ndim == 4:
            height, width = sample.shape[-2:]
            if height % self.fold or width % self.fold:
                raise DiffratioError(
                    f"a {height}x{width} sample does not fit flux: it takes 2x2 latents as one token; choose a height "
                    "and width of the picture that are multiples of twice the VAE's scale factor"
                )
            return TokenGrid(height // self.fold, width // self.fold)
        if sample.ndim != 3:
            raise DiffratioError(
                f"flux takes samples (batch, channels, height, width) or by token (batch, tokens, channels), got "
                f"{tuple(sample.shape)}"
            )
        tokens = sample.shape[1]
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise DiffratioError(f"{tokens} tokens of a flux sample are no square: img_ids say which grid they are")
        return TokenGrid(side, side)

    def grid_of(
        self, transformer: nn.Module, arguments: Mapping[str, Any], known: TokenGrid | None = None
    ) -> TokenGrid:
        """Any height and width, read from `img_ids`, once in a run.

        Raises:
            DiffratioError: they are missing, or not the grid of one picture.
        """
        sample, ids = arguments["hidden_states"], arguments.get("img_ids")
        if known is not None and known.tokens == sample.shape[1]:
            return known
        if not isinstance(ids, Tensor):
            raise DiffratioError("flux takes its token grid from img_ids, and the forward got none")
        return _raster(ids[0] if ids.ndim == 3 else ids, sample.shape[1])

    def text_tokens(self, transformer: nn.Module) -> int:
        """What the configuration notes, or T5's 512 (dev) and 256 (schnell)."""
        config = _config(transformer)
        return int(config.get(TEXT_TOKENS, _TEXT_TOKENS[bool(config.guidance_embeds)]))

    def noise_level(self, timestep: Tensor) -> Tensor:
        """u is the timestep itself."""
        return timestep.float()

    def timestep(self, noise_level: Tensor) -> Tensor:
        """u."""
        return noise_level

    def text_width(self, transformer: nn.Module) -> int:
        """`joint_attention_dim`: T5's."""
        return int(_config(transformer).joint_attention_dim)

    def pooled_width(self, transformer: nn.Module) -> int:
        """Of CLIP's pooled state."""
        return int(_config(transformer).pooled_projection_dim)

    def level_shift(self, transformer: nn.Module) -> float:
        """By the number of tokens (dev), or none (schnell)."""
        dev = bool(_config(transformer).guidance_embeds)
        return math.exp(_log_shift(self.grid(transformer).tokens)) if dev else 1.0

    def sample_side(self, transformer: nn.Module) -> int:
        """Twice the side of the default token grid."""
        return self.fold * self.grid(transformer).height

    def model_time(self, timesteps: Tensor) -> Tensor:
        """u, as the pipeline gives it."""
        return timesteps / TIMESTEPS

    def packed(self, sample: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, 4 C), channels of a token in the order of channel, row, column."""
        return patches(sample, self.fold)

    def unpacked(self, packed: Tensor, grid: TokenGrid) -> Tensor:
        """(B, N, 4 C) -> (B, C, H, W)."""
        size = (self.fold * grid.height, self.fold * grid.width)
        return nn.functional.fold(packed.transpose(1, 2), size, self.fold, stride=self.fold)

    def scale_input(self, transformer: nn.Module, scale: float, batch: int) -> dict[str, Tensor]:
        """`guidance` (B,) of dev; schnell takes none."""
        if not _config(transformer).guidance_embeds:
            return {}
        return {"guidance": torch.full((batch,), float(scale), device=next(transformer.parameters()).device)}

    def predict(self, transformer: nn.Module, inputs: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """As the base class's, by token inside; where the condition holds no guidance scale dev is told 1.

        That is the scale that fine-tuning on data takes: higher ones stand for guided predictions.
        """
        grid, tokens = self.grid(transformer, inputs), condition["encoder_hidden_states"].shape[1]
        ids = {
            "img_ids": image_ids(grid).to(inputs.device),
            "txt_ids": torch.zeros(tokens, 3, device=inputs.device),
        }
        guidance = self.scale_input(transformer, _TRAINED, len(inputs))
        output = super().predict(transformer, self.packed(inputs), timestep, {**guidance, **ids, **condition})
        return self.unpacked(output, grid)

    def scheduler_level(self, timesteps: Tensor) -> Tensor:
        """u = t / 1000: the pipeline divides."""
        return timesteps.float() / TIMESTEPS

    def default_run(self, transformer: nn.Module, steps: int, guidance: Guidance = "cfg") -> SamplingRun:
        """The published pipelines' levels: shifted by the number of tokens (dev), or uniform (schnell).

        Whatever `guidance` says there are no halves: it is distilled into the model.
        """
        if steps < 1:
            raise DiffratioError(f"steps must be at least 1, got {steps}")
        grid, dev = self.grid(transformer), bool(_config(transformer).guidance_embeds)
        scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev)
        sigmas = [(steps - step) / steps for step in range(steps)]
        scheduler.set_timesteps(sigmas=sigmas, mu=_log_shift(grid.tokens) if dev else None)
        levels = tuple(self.scheduler_level(scheduler.timesteps).clamp(0, 1).tolist())
        return SamplingRun(levels, grid, "none", self.text_tokens(transformer))

    def per_token_output(self, transformer: nn.Module, output: Tensor) -> Tensor:
        """(B, N, C): what the transformer gives is by token already, what `predict` gives is folded again."""
        return self.packed(output) if output.ndim == 4 else output

    def example(
        self, transformer: nn.Module, batch: int, seed: int = 0, run: SamplingRun | None = None
    ) -> dict[str, Any]:
        """Noise in the sample, as text and as its pooled embedding."""
        config = _config(transformer)
        like = next(transformer.parameters())
        run = run or self.default_run(transformer, 1)
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "hidden_states": (run.grid.tokens, config.in_channels),
            "encoder_hidden_states": (run.text_tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        noise = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
        arguments = {name: value.to(like.device, like.dtype) for name, value in noise.items()}
        arguments["img_ids"] = image_ids(run.grid).to(like.device)
        arguments["txt_ids"] = torch.zeros(run.text_tokens, 3, device=like.device)
        if config.guidance_embeds:
            arguments["guidance"] = torch.full((batch,), _GUIDANCE, device=like.device)
        return arguments

    def describe(self, transformer: nn.Module) -> Description:
        """Costs of a block at N image and T text tokens, and of what surrounds the blocks.

        Double blocks: joint attention 4 (N + T) d^2 + 2 (N + T)^2 d, MLPs 2 m (N + T) d^2, modulations 12 d^2. Single
        blocks: attention 3 (N + T) d^2 + 2 (N + T)^2 d, MLP and output projection (2 m + 1) (N + T) d^2, modulation
        3 d^2; the last one computes the text although nothing reads it. Once a forward: embedders of the timestep and
        of the guidance 256 d + d^2 each, pooled text p d + d^2, output modulation 2 d^2, text projection T c d.
        """
        config, model = _config(transformer), cast(Any, transformer)
        width = config.num_attention_heads * config.attention_head_dim
        embedders = 2 if config.guidance_embeds else 1
        return Description(
            family=self.name,
            width=width,
            blocks=tuple(_block_cost(block, width) for block in self.blocks(transformer)),
            per_token=width * (config.in_channels + model.proj_out.out_features),
            fixed=(embedders * (_FREQUENCIES + width) + config.pooled_projection_dim + 3 * width) * width,
            per_text_token=config.joint_attention_dim * width,
        )

    def tiny(self, **changes: Any) -> nn.Module:
        """One double and two single blocks of two heads of 8 channels, guidance embedded as in dev.

        A 4x4 grid (`token_side`) of 4 channels a token, text of 12 and pooled text of 6 channels.
        """
        sizes: dict[str, Any] = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 6,
            "guidance_embeds": True,
        }
        side = changes.pop("token_side", 4)
        transformer: Any = FluxTransformer2DModel(**(sizes | changes))
        transformer.register_to_config(**{TOKEN_SIDE: side})
        for block in self.blocks(transformer):
            names = ("norm", "norm1", "norm1_context")
            modulate_visibly_(getattr(block, name) for name in names if getattr(block, name, None) is not None)
        return transformer

    def index_attention_(self, transformer: nn.Module) -> Any:
        """In the blocks of both kinds."""
        return index_attention_(self._attention(transformer), RotaryAttention, FluxAttnProcessor)

    def plain_attention_(self, transformer: nn.Module, processors: Any) -> None:
        """The same objects as before."""
        plain_attention_(self._attention(transformer), processors)

    def _attention(self, transformer: nn.Module) -> list[nn.Module]:
        return [block.get_submodule("attn") for block in self.blocks(transformer)]


def image_ids(grid: TokenGrid) -> Tensor:
    """`img_ids` of a grid in raster order, (N, 3): 0, row, column."""
    rows, columns = torch.arange(grid.height), torch.arange(grid.width)
    return torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())


def _raster(ids: Tensor, tokens: int) -> TokenGrid:
    """The grid that ids (N, 3) number in raster order from 0."""
    ids = ids.detach().cpu()
    if len(ids) == tokens and ids.ndim == 2:
        width = max(1, int((ids[:, 1] == ids[0, 1]).sum()))
        grid = TokenGrid(max(1, tokens // width), width)
        if grid.tokens == tokens and torch.equal(ids[:, 1:], image_ids(grid)[:, 1:].to(ids.dtype)):
            return grid
    raise DiffratioError(
        f"img_ids {tuple(ids.shape)} of {tokens} image tokens do not number the rows and columns of one picture from "
        "0; pictures beside it (FLUX Kontext and the like) do not go with a method"
    )


def _log_shift(tokens: int) -> float:
    """The line through the published pipelines' two points."""
    (low, at_low), (high, at_high) = _SHIFT
    return at_low + (tokens - low) * (at_high - at_low) / (high - low)


def _config(transformer: nn.Module) -> Any:
    return transformer.config


def _block_cost(block: Any, width: int) -> BlockCost:
    square = width**2
    if not hasattr(block, "ff"):
        side = width * (block.proj_mlp.out_features + block.proj_out.in_features)
        attention = SiteCost("self_attention", square, 2 * square, 2 * width, "joint", 3 * square)
        return BlockCost((attention, SiteCost("block", side, per_text=side)), fixed=3 * square)
    mlp = 2 * width * block.ff.net[-1].in_features
    attention = SiteCost("self_attention", 2 * square, 2 * square, 2 * width, "joint", 4 * square)
    return BlockCost((attention, SiteCost("feed_forward", mlp, per_text=mlp)), fixed=12 * square)
