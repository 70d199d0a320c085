"""Settings of inpainting, as configs and cards hold them."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.errors import DiffratioError, unknown

LOSSES = ("all", "hole")


@dataclass(frozen=True)
class InpaintSettings:
    """What a model that fills holes is trained on.

    Args:
        mask: `boxes`, `strokes` or `mixed` draws masks; else a PNG, or a folder of PNGs, white where the hole is.
        share: lowest and highest share of the picture that is hole, in (0, 1], of drawn masks; higher hides more.
        loss: `all` counts the error of the whole picture, `hole` that inside the hole alone.
        image_dropout: fraction of training samples in which the whole picture is hole: the model learns to paint
            without a picture, too.
    """

    mask: str = "mixed"
    share: tuple[float, float] = (0.1, 0.5)
    loss: str = "all"
    image_dropout: float = 0.0

    def __post_init__(self) -> None:
        share = tuple(self.share)
        object.__setattr__(self, "share", share)
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in share)
        if not self.mask or not isinstance(self.mask, str):
            raise DiffratioError(f"inpaint.mask {self.mask!r} must be boxes, strokes, mixed, a PNG or a folder of PNGs")
        if len(share) != 2 or not numbers or not 0 < share[0] <= share[1] <= 1:
            raise DiffratioError(
                f"inpaint.share {list(share)} must be two fractions of the picture, 0 < lowest <= highest <= 1"
            )
        if self.loss not in LOSSES:
            raise unknown("inpaint.loss", self.loss, LOSSES)
        if not 0 <= self.image_dropout <= 1:
            raise DiffratioError(f"inpaint.image_dropout {self.image_dropout!r} is outside [0, 1]")
