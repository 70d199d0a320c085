"""A transformer that fits what a job shows it: widened for inpainting, or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffratio.backbones.widening import image_channels, inpaints, widen_
from diffratio.errors import DiffratioError
from diffratio.inpainting import InpaintSettings


def sees_holes_(transformer: nn.Module, cfg: Mapping[str, Any], settings: InpaintSettings | None) -> nn.Module:
    """Widens a transformer for the masked picture and the mask; one that sees them already stays as it is.

    Args:
        transformer: dense.
        cfg: config of the job.
        settings: of inpainting; None for a job without.

    Raises:
        DiffratioError: an inpainting model without masks, or new input channels that the job would not train or teach.
    """
    source = cfg["backbone"]["source"]
    if settings is None:
        if inpaints(transformer):
            raise DiffratioError(
                f"backbone.source={source!r} is an inpainting model: it sees a masked picture and its mask; "
                "set inpaint=default, or choose another source"
            )
        return transformer
    if inpaints(transformer):
        return transformer
    if (cfg.get("lora") or {}).get("rank") is not None:
        raise DiffratioError(
            "inpaint gives the patch embedding new channels, which LoRA leaves as they are; set lora=none, or take an "
            "inpainting model as backbone.source"
        )
    if cfg["optimizer"]["weights"] == "none":
        raise DiffratioError(
            "inpaint gives the patch embedding new channels, which optimizer.weights=none does not train; set "
            "optimizer.weights=all, or take an inpainting model as backbone.source"
        )
    if cfg["objective"]["distill"]:
        raise DiffratioError(
            f"objective.distill={cfg['objective']['distill']:g} has the base for its teacher, which does not see the "
            "new channels of inpaint and would teach to ignore them; set objective.distill=0, or take an inpainting "
            "model as backbone.source"
        )
    return widen_(transformer, 2 * image_channels(transformer) + 1)
