"""Inpainting: holes in pictures, and what a model that fills them sees beside the noised picture."""

from diffratio.inpainting.holes import SHAPES, hole
from diffratio.inpainting.known import Known
from diffratio.inpainting.masks import Masks
from diffratio.inpainting.settings import InpaintSettings

__all__ = ["SHAPES", "InpaintSettings", "Known", "Masks", "hole"]
