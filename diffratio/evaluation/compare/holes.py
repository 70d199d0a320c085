"""What arms of an inpainting comparison are asked for: held-out pictures with fixed holes, the same for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import inpaints
from diffratio.checkpoint import read_card, resolve
from diffratio.errors import DiffratioError
from diffratio.evaluation.compare.arms import Contender, Lineup
from diffratio.evaluation.compare.settings import CompareSettings
from diffratio.inpainting import InpaintSettings, Known, Masks


def holes_of(source: str) -> InpaintSettings | None:
    """What a checkpoint's card says of its masks; None where there is no card, or no masks in it."""
    place = resolve(source)
    if isinstance(place, str) or not (Path(place) / "card.json").is_file():
        return None
    return read_card(place).inpaint


def shown_to(one: Contender) -> Known | None:
    """The pictures that an arm fills; None for an arm that fills none."""
    known: Known | None = getattr(one.pipe, "known", None)
    return known


def loss_part(source: str) -> str:
    """The part of the pictures that a checkpoint's validation loss counts."""
    settings = holes_of(source)
    return "all" if settings is None else settings.loss


def true_pictures(
    settings: CompareSettings, held_out: Callable[[int], tuple[Tensor, Tensor]], seed: int
) -> Callable[[], tuple[Known, list[int]]]:
    """Makes the held-out pictures, with the masks that the card of `weights` describes, and their labels, when asked.

    Args:
        settings: of the comparison.
        held_out: n -> held-out images (n, C, H, W) in [-1, 1] and labels (n,).
        seed: of the masks.
    """

    def make() -> tuple[Known, list[int]]:
        images, labels = held_out(settings.reference_n)
        masks = Masks(holes_of(settings.weights) or InpaintSettings(), images.shape[-1], seed)
        return Known(images, masks.fixed(range(len(images)))), labels.tolist()

    return make


def give_holes_(lineup: Lineup, make: Callable[[], tuple[Known, list[int]]]) -> None:
    """Gives every arm the same pictures to fill, of their own classes, where they are inpainting models.

    Raises:
        DiffratioError: some arms are and others are not.
    """
    arms = [one for one in lineup.contenders if one.pipe is not None]
    fill = inpaints(lineup.dense.pipe.transformer)
    for one in arms:
        if inpaints(one.pipe.transformer) != fill:
            raise DiffratioError(
                f"{one.arm.weights!r} {'does not inpaint' if fill else 'inpaints'} and "
                f"{lineup.dense.arm.weights!r} {'does' if fill else 'does not'}; compare checkpoints of one kind"
            )
    if not fill:
        return
    known, labels = make()
    for one in arms:
        one.pipe.known = known
        if backbone_of(one.pipe.transformer).condition == "class":
            one.pipe.asked = tuple(labels)
