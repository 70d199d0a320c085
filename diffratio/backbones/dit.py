"""DiT (arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`: pixels or latents, with or without learned variance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffratio.backbones.attention import attention_modules, index_attention_, plain_attention_
from diffratio.backbones.base import Patched, modulate_visibly_, register
from diffratio.cost.macs import BlockCost, Description, SiteCost
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.tokens.grid import TokenGrid

_FREQUENCIES = 256  # sinusoidal channels that enter each timestep embedder


@register
class DiT(Patched):
    """One stream of image tokens; every block has its own timestep and label embedder."""

    name = "dit"
    transformer_class = DiTTransformer2DModel
    per_sample = ("timestep", "class_labels")
    sites = {"self_attention": "attn1", "feed_forward": "ff"}
    batched = ("hidden_states", "timestep", "class_labels")
    attention = "cross_attention_kwargs"
    root_blocks = (0,)  # the last layer is conditioned by its embedder

    def grid(self, transformer: nn.Module, sample: Tensor | None = None) -> TokenGrid:
        """Raises DiffratioError where the sample is not a square of whole patches, which diffusers' DiT needs."""
        config: Any = transformer.config
        patch = config.patch_size
        height, width = (config.sample_size,) * 2 if sample is None else sample.shape[-2:]
        if height % patch or width % patch or height != width:
            raise DiffratioError(
                f"a {height}x{width} sample does not fit this DiT: it takes square samples of whole {patch}x{patch} "
                f"patches (configured size {config.sample_size}); resize or pad the data (data.image_size)"
            )
        return TokenGrid(height // patch, width // patch)

    def null_label(self, transformer: nn.Module) -> int:
        """The extra row of the label table."""
        config: Any = transformer.config
        return int(config.num_embeds_ada_norm)

    def example(
        self, transformer: nn.Module, batch: int, seed: int = 0, run: SamplingRun | None = None
    ) -> dict[str, Any]:
        """Noise at the configured size, or the run's, and class 0."""
        config: Any = transformer.config
        like = next(transformer.parameters())
        grid = self.grid(transformer) if run is None else run.grid
        shape = (batch, config.in_channels, grid.height * config.patch_size, grid.width * config.patch_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        labels = torch.zeros(batch, dtype=torch.long, device=like.device)
        return {"hidden_states": noise.to(like.device, like.dtype), "class_labels": labels}

    def describe(self, transformer: nn.Module) -> Description:
        """Self-attention 4 N d^2 + 2 N^2 d, MLP 2 m N d^2, modulation 6 d^2, timestep embedder 256 d + d^2 a block."""
        config: Any = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        first: Any = self.blocks(transformer)[0]
        hidden = first.ff.net[-1].in_features
        patch_pixels = config.patch_size**2
        embedder = _FREQUENCIES * width + width**2
        block = BlockCost(
            sites=(
                SiteCost("self_attention", per_query=2 * width**2, per_key=2 * width**2, per_pair=2 * width),
                SiteCost("feed_forward", per_query=2 * width * hidden),
            ),
            fixed=6 * width**2 + embedder,
        )
        return Description(
            family=self.name,
            width=width,
            blocks=(block,) * config.num_layers,
            per_token=patch_pixels * width * (config.in_channels + transformer.out_channels),
            fixed=embedder + 2 * width**2,  # block 0's embedder runs once more for the output modulation
        )

    def tiny(self, **changes: Any) -> nn.Module:
        """Two heads of 8 channels, three blocks, a 4x4 grid."""
        sizes: dict[str, Any] = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
        }
        transformer: Any = DiTTransformer2DModel(**(sizes | changes))
        modulate_visibly_(block.norm1 for block in transformer.transformer_blocks)
        return transformer

    def prepare_(self, transformer: nn.Module) -> dict[str, Any]:
        """Sets the label dropout to 0: diffusers drops labels in train mode independently in every block."""
        rates = []
        for block in self.blocks(transformer):
            embedder: Any = block.norm1.emb.class_embedder  # type: ignore[union-attr]
            rates.append(embedder.dropout_prob)
            embedder.dropout_prob = 0.0
        return {"label_dropout": rates}

    def index_attention_(self, transformer: nn.Module) -> Any:
        """In the self-attention of every block."""
        return index_attention_(attention_modules(self.blocks(transformer), self.sites["self_attention"]))

    def plain_attention_(self, transformer: nn.Module, processors: Any) -> None:
        """The same objects as before."""
        plain_attention_(attention_modules(self.blocks(transformer), self.sites["self_attention"]), processors)

    def undo_(self, transformer: nn.Module, prepared: dict[str, Any]) -> None:
        """Puts the label dropout back."""
        for block, rate in zip(self.blocks(transformer), prepared["label_dropout"], strict=True):
            block.norm1.emb.class_embedder.dropout_prob = rate  # type: ignore[union-attr]
