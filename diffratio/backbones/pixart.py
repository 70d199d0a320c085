"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (2403.04692) as diffusers' `PixArtTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from diffratio.backbones.attention import IndexedAttention, TextAttention, index_attention_, plain_attention_
from diffratio.backbones.base import Patched, register
from diffratio.cost.macs import BlockCost, Description, SiteCost
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError

_FREQUENCIES = 256  # sinusoidal channels that enter each embedder
_TEXT_TOKENS = {"alpha": 120, "sigma": 300}  # what their pipelines pad every prompt to
_SIGMA_SIZE = 128  # from this latent size on, alpha has micro-conditions and Sigma has none


@register
class PixArt(Patched):
    """One stream of image tokens that reads the text by cross-attention; one modulation for all blocks."""

    name = "pixart"
    transformer_class = PixArtTransformer2DModel
    condition = "text"
    pipeline = "PixArtAlphaPipeline"
    # `timestep` is the shared modulation (B, 6 d) inside the blocks; the text and its mask have no image tokens
    per_sample = ("timestep", "encoder_hidden_states", "encoder_attention_mask")
    sites = {"self_attention": "attn1", "cross_attention": "attn2", "feed_forward": "ff"}
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "added_cond_kwargs",
    )
    refused = {"attention_mask": "it masks image tokens by position; a text mask is encoder_attention_mask"}
    guidance_order = "uncond_first"
    attention = "cross_attention_kwargs"

    def text_tokens(self, transformer: nn.Module) -> int:
        """What was set; else 300 where it can only be Sigma's, otherwise alpha's 120: smaller ones look the same."""
        known = super().text_tokens(transformer)
        if known:
            return known
        config: Any = transformer.config
        sigma = config.sample_size >= _SIGMA_SIZE and not transformer.use_additional_conditions
        return _TEXT_TOKENS["sigma" if sigma else "alpha"]

    def text_width(self, transformer: nn.Module) -> int:
        """Channels of the captions, or of the keys where there is no caption projection."""
        config: Any = transformer.config
        return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)

    def example(
        self, transformer: nn.Module, batch: int, seed: int = 0, run: SamplingRun | None = None
    ) -> dict[str, Any]:
        """Noise in the sample and as text, every text token valid; micro-conditions of the sample's own size."""
        config: Any = transformer.config
        like = next(transformer.parameters())
        run = run or self.default_run(transformer, 1)
        generator = torch.Generator().manual_seed(seed)
        height, width = run.grid.height * config.patch_size, run.grid.width * config.patch_size
        noise = torch.randn(batch, config.in_channels, height, width, generator=generator)
        text = torch.randn(batch, run.text_tokens, self.text_width(transformer), generator=generator)
        arguments: dict[str, Any] = {
            "hidden_states": noise.to(like.device, like.dtype),
            "encoder_hidden_states": text.to(like.device, like.dtype),
            "encoder_attention_mask": torch.ones(batch, run.text_tokens, dtype=torch.long, device=like.device),
        }
        if transformer.use_additional_conditions:
            arguments["added_cond_kwargs"] = _sizes(arguments["hidden_states"])
        return arguments

    def predict(self, transformer: nn.Module, inputs: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """As the base class's; large alpha models are told the size of the sample where the condition does not."""
        if transformer.use_additional_conditions:
            condition = {"added_cond_kwargs": _sizes(inputs), **condition}
        return super().predict(transformer, inputs, timestep, condition)

    def describe(self, transformer: nn.Module) -> Description:
        """Costs of a block at N image and T text tokens, and of what surrounds the blocks.

        Self-attention 4 N d^2 + 2 N^2 d, cross-attention 2 N d^2 + 2 T d^2 + 2 N T d, MLP 2 m N d^2. Once a forward:
        timestep embedder 256 d + d^2, modulation 6 d^2, caption projection T (c d + d^2), and with micro-conditions
        three embedders of a third of the width.
        """
        config: Any = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        first: Any = self.blocks(transformer)[0]
        hidden = first.ff.net[-1].in_features
        fixed = _FREQUENCIES * width + width**2 + 6 * width**2
        if transformer.use_additional_conditions:  # height, width and aspect ratio
            third = width // 3
            fixed += 3 * (_FREQUENCIES * third + third**2)
        captions = config.caption_channels
        block = BlockCost(
            sites=(
                SiteCost("self_attention", per_query=2 * width**2, per_key=2 * width**2, per_pair=2 * width),
                SiteCost(
                    "cross_attention",
                    per_query=2 * width**2,
                    per_key=2 * width * first.attn2.to_k.in_features,
                    per_pair=2 * width,
                    keys="text",
                ),
                SiteCost("feed_forward", per_query=2 * width * hidden),
            ),
        )
        return Description(
            family=self.name,
            width=width,
            blocks=(block,) * config.num_layers,
            per_token=config.patch_size**2 * width * (config.in_channels + transformer.out_channels),
            fixed=fixed,
            per_text_token=0 if captions is None else captions * width + width**2,
        )

    def tiny(self, **changes: Any) -> nn.Module:
        """Three heads of 8 channels, three blocks, a 4x4 grid, text of 12 channels; `use_additional_conditions` too."""
        sizes: dict[str, Any] = {
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 12,
        }
        sizes |= changes
        sizes.setdefault("cross_attention_dim", sizes["num_attention_heads"] * sizes["attention_head_dim"])
        transformer: Any = PixArtTransformer2DModel(**sizes)
        # diffusers' default initialisation makes the modulation tiny; tests need blocks that visibly change tokens
        nn.init.normal_(transformer.adaln_single.linear.weight, std=0.3)
        for block in self.blocks(transformer):
            nn.init.normal_(block.scale_shift_table, std=0.3)  # type: ignore[arg-type]
        return transformer

    def index_attention_(self, transformer: nn.Module) -> Any:
        """In self- and cross-attention: both are handed a block's attention arguments."""
        own, text = self._attention(transformer)
        found = index_attention_(own, IndexedAttention)
        try:
            return found, index_attention_(text, TextAttention)
        except DiffratioError:
            plain_attention_(own, found)
            raise

    def plain_attention_(self, transformer: nn.Module, processors: Any) -> None:
        """The same objects as before."""
        for modules, kept in zip(self._attention(transformer), processors, strict=True):
            plain_attention_(modules, kept)

    def _attention(self, transformer: nn.Module) -> tuple[list[Any], list[Any]]:
        blocks: Any = self.blocks(transformer)
        return [block.attn1 for block in blocks], [block.attn2 for block in blocks]


def _sizes(sample: Tensor) -> dict[str, Tensor]:
    """Micro-conditions of latents (B, C, H, W): height and width of the picture (B, 2), and their quotient (B, 1)."""
    size = torch.tensor([8.0 * sample.shape[-2], 8.0 * sample.shape[-1]], device=sample.device, dtype=sample.dtype)
    return {"resolution": size.repeat(len(sample), 1), "aspect_ratio": (size[:1] / size[1:]).repeat(len(sample), 1)}
