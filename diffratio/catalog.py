"""Names of the methods and backbones with one line each; imports nothing, so that listing them costs nothing."""

from __future__ import annotations

# name -> (module, one line); modules are imported when a method is used
METHODS: dict[str, tuple[str, str]] = {
    "block_cache": (
        "diffratio.methods.block_cache",
        "a range of blocks skipped between full steps, its residual added",
    ),
    "block_drop": ("diffratio.methods.block_drop", "routed; whole blocks bypassed, those of least change first"),
    "dato": ("diffratio.methods.dato", "prunes beside the most dynamic tokens, caches steps; training-free (DaTo)"),
    "dense": ("diffratio.methods.dense", "every token in every block: the control that does nothing"),
    "diffcr": ("diffratio.methods.diffcr", "learned routers and differentiable keep ratios, layer x region"),
    "external_cache": ("diffratio.methods.external_cache", "a cache of diffusers or cache-dit, by its own library"),
    "fewer_steps": ("diffratio.methods.fewer_steps", "the dense model at the step count that costs the budget"),
    "guidance_interval": ("diffratio.methods.guidance_interval", "no unconditional half at some steps"),
    "hand": ("diffratio.methods.hand", "routed; fewer tokens in middle blocks at noisy levels, by rule"),
    "importance": ("diffratio.methods.importance", "merges where guidance changes little, training-free"),
    "lite_uncond": ("diffratio.methods.lite_uncond", "fewer tokens in the unconditional guidance half alone"),
    "measured": ("diffratio.methods.measured", "routed; a schedule from measured output error, without training"),
    "mod": ("diffratio.methods.mod", "routed; the same keep ratio everywhere (Mixture-of-Depths)"),
    "random_keep": ("diffratio.methods.random_keep", "random tokens, the same keep ratio everywhere"),
    "sdtm": ("diffratio.methods.sdtm", "windows first, then single tokens, by step; training-free (SDTM, merging)"),
    "sdtm_cached": (
        "diffratio.methods.sdtm_cached",
        "sdtm whose merged tokens keep most of a stored output (SDTM release)",
    ),
    "todo": ("diffratio.methods.todo", "keys and values from a coarser grid, training-free (ToDo)"),
    "tofu": ("diffratio.methods.tofu", "ToMe's matching; early blocks drop, later ones merge, training-free (ToFu)"),
    "tome": ("diffratio.methods.tome", "merges similar tokens around attention, training-free (ToMe)"),
}

# name -> (module, class of the transformer in diffusers, one line); importing diffusers waits until a family is used
FAMILIES: dict[str, tuple[str, str, str]] = {
    "dit": ("diffratio.backbones.dit", "DiTTransformer2DModel", "DiT: class-conditional, one stream, adaLN-Zero"),
    "flux": (
        "diffratio.backbones.flux",
        "FluxTransformer2DModel",
        "FLUX.1: image and text streams in joint attention, then one stream of both; guidance-distilled",
    ),
    "pixart": (
        "diffratio.backbones.pixart",
        "PixArtTransformer2DModel",
        "PixArt-alpha and Sigma: text by cross-attention, one stream, adaLN-single",
    ),
    "sd3": (
        "diffratio.backbones.sd3",
        "SD3Transformer2DModel",
        "Stable Diffusion 3 and 3.5: image and text streams in joint attention, adaLN-Zero",
    ),
}
