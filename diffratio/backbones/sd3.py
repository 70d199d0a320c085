"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206) as diffusers' `SD3Transformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from diffratio.backbones.attention import index_attention_, plain_attention_
from diffratio.backbones.base import Patched, modulate_visibly_, register
from diffratio.backbones.joint import JointAttention
from diffratio.cost.macs import BlockCost, Description, SiteCost
from diffratio.cost.run import Guidance, SamplingRun
from diffratio.errors import DiffratioError
from diffratio.tokens.grid import TokenGrid

_FREQUENCIES = 256  # sinusoidal channels that enter the timestep embedder
_CLIP_TOKENS = 77
_TEXT_TOKENS = _CLIP_TOKENS + 256  # of the CLIP encoders side by side, and of T5
_SHIFT = 3.0  # of the noise levels, in the published schedulers of SD3 and SD3.5


@register
class SD3(Patched):
    """Image and text streams with weights of their own that attend to each other; the last block ends the text.

    Only image tokens are reduced; the bypass of a block bypasses both streams. In some blocks SD3.5 has a second
    attention among the image tokens, which belongs to the site `self_attention`.
    """

    name = "sd3"
    transformer_class = SD3Transformer2DModel
    condition = "text"
    pipeline = "StableDiffusion3Pipeline"
    per_sample = ("encoder_hidden_states", "temb")
    sites = {"self_attention": "attn", "feed_forward": "ff"}
    streams = ("encoder_hidden_states", "hidden_states")
    batched = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    refused = {
        "skip_layers": "a method decides which blocks run; diffratio.BlockDrop(blocks=...) leaves blocks out",
        "block_controlnet_hidden_states": "its residuals belong to blocks that run in full in every step",
        "joint_attention_kwargs.ip_adapter_image_embeds": "image embeddings of an IP adapter are not split by sample",
    }
    guidance_order = "uncond_first"
    attention = "joint_attention_kwargs"

    def grid(self, transformer: nn.Module, sample: Tensor | None = None) -> TokenGrid:
        """Any height and width of whole patches, as far as the position table goes."""
        grid, config = super().grid(transformer, sample), _config(transformer)
        largest = config.pos_embed_max_size
        if max(grid.height, grid.width) > largest:
            raise DiffratioError(
                f"a grid of {grid.height}x{grid.width} tokens does not fit this sd3: its position table is "
                f"{largest}x{largest}; choose a smaller picture"
            )
        return grid

    def site_modules(self, block: nn.Module, site: str) -> list[nn.Module]:
        """The second attention belongs to the first one's site."""
        modules = super().site_modules(block, site)
        second = getattr(block, "attn2", None)
        return [*modules, second] if site == "self_attention" and second is not None else modules

    def text_tokens(self, transformer: nn.Module) -> int:
        """77 of the CLIP encoders and 256 of T5, as the pipeline pads every prompt."""
        return super().text_tokens(transformer) or _TEXT_TOKENS

    def text_width(self, transformer: nn.Module) -> int:
        """`joint_attention_dim`: T5's, to which the states of both CLIP encoders side by side are padded."""
        return int(_config(transformer).joint_attention_dim)

    def pooled_width(self, transformer: nn.Module) -> int:
        """Of both CLIP encoders' projected states side by side."""
        return int(_config(transformer).pooled_projection_dim)

    def level_shift(self, transformer: nn.Module) -> float:
        """3, whatever the size."""
        return _SHIFT

    def longest_prompt(self, transformer: nn.Module) -> int:
        """T5's tokens alone: the pipeline sets those of CLIP before them."""
        return self.text_tokens(transformer) - _CLIP_TOKENS

    def default_run(self, transformer: nn.Module, steps: int, guidance: Guidance = "cfg") -> SamplingRun:
        """The levels of the published pipelines: flow-matching Euler with shift 3."""
        if steps < 1:
            raise DiffratioError(f"steps must be at least 1, got {steps}")
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
        scheduler.set_timesteps(steps)
        levels = tuple(self.noise_level(scheduler.timesteps).clamp(0, 1).tolist())
        return SamplingRun(levels, self.grid(transformer), guidance, self.text_tokens(transformer))

    def example(
        self, transformer: nn.Module, batch: int, seed: int = 0, run: SamplingRun | None = None
    ) -> dict[str, Any]:
        """Noise in the sample, as text and as its pooled embedding."""
        config = _config(transformer)
        like = next(transformer.parameters())
        run = run or self.default_run(transformer, 1)
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "hidden_states": (config.in_channels, *(config.patch_size * n for n in (run.grid.height, run.grid.width))),
            "encoder_hidden_states": (run.text_tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        noise = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
        return {name: value.to(like.device, like.dtype) for name, value in noise.items()}

    def describe(self, transformer: nn.Module) -> Description:
        """Costs of a block at N image and T text tokens, and of what surrounds the blocks.

        Joint attention 4 (N + T) d^2 + 2 (N + T)^2 d, MLPs 2 m (N + T) d^2, modulations 6 d^2 each; a second attention
        4 N d^2 + 2 N^2 d and 3 d^2 more modulation. The last block projects no text out of its attention, has no text
        MLP and a text modulation of 2 d^2. Once a forward: timestep embedder 256 d + d^2, pooled text p d + d^2,
        output modulation 2 d^2, text projection T c d.
        """
        config = _config(transformer)
        width = config.num_attention_heads * config.attention_head_dim
        return Description(
            family=self.name,
            width=width,
            blocks=tuple(_block_cost(block, width) for block in self.blocks(transformer)),
            per_token=config.patch_size**2 * width * (config.in_channels + transformer.out_channels),
            fixed=(_FREQUENCIES + config.pooled_projection_dim + 4 * width) * width,
            per_text_token=config.joint_attention_dim * config.caption_projection_dim,
        )

    def tiny(self, **changes: Any) -> nn.Module:
        """SD3.5's form: two heads of 8 channels, three blocks, the first with a second attention, normed queries.

        A 4x4 grid, text of 12 and pooled text of 6 channels.
        """
        sizes: dict[str, Any] = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 6,
            "pos_embed_max_size": 12,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        }
        sizes |= changes
        sizes.setdefault("caption_projection_dim", sizes["num_attention_heads"] * sizes["attention_head_dim"])
        transformer: Any = SD3Transformer2DModel(**sizes)
        modulate_visibly_(
            norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)
        )
        return transformer

    def index_attention_(self, transformer: nn.Module) -> Any:
        """In the joint and in the second attention: both are handed a block's attention arguments."""
        return index_attention_(self._attention(transformer), JointAttention, JointAttnProcessor2_0)

    def plain_attention_(self, transformer: nn.Module, processors: Any) -> None:
        """The same objects as before."""
        plain_attention_(self._attention(transformer), processors)

    def _attention(self, transformer: nn.Module) -> list[nn.Module]:
        return [one for block in self.blocks(transformer) for one in self.site_modules(block, "self_attention")]


def _config(transformer: nn.Module) -> Any:
    return transformer.config


def _block_cost(block: Any, width: int) -> BlockCost:
    square, last = width**2, block.context_pre_only
    image: dict[str, Any] = {"per_query": 2 * square, "per_key": 2 * square, "per_pair": 2 * width}
    mlp = 2 * width * block.ff.net[-1].in_features
    joint = SiteCost("self_attention", **image, keys="joint", per_text=(3 if last else 4) * square)
    second = () if block.attn2 is None else (SiteCost("self_attention", **image),)
    modulation = (6 if block.attn2 is None else 9) + (2 if last else 6)
    feed_forward = SiteCost("feed_forward", per_query=mlp, per_text=0 if last else mlp)
    return BlockCost(sites=(joint, *second, feed_forward), fixed=modulation * square)
