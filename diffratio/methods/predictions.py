"""How far two predictions of a transformer are apart, token by token."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffratio.cost.macs import Description
from diffratio.errors import DiffratioError
from diffratio.tokens.grid import TokenGrid


def token_distance(method: str, description: Description, one: Tensor, other: Tensor, grid: TokenGrid) -> Tensor:
    """Mean of |one - other| over predicted channels and the pixels of each patch, without a learned variance.

    Args:
        method: whose name an error carries.
        description: the transformer.
        one: prediction (B, C, H, W), or by token (B, N, C).
        other: another one of that shape.
        grid: token grid.

    Returns:
        (B, N).

    Raises:
        DiffratioError: it cannot be told which of the channels are a variance.
    """
    if one.ndim == 3:  # by token there is none
        return (one - other).abs().mean(-1)
    height, width = one.shape[-2:]
    channels = _channels(method, description, one.shape[1], height * width // grid.tokens)
    difference = (one[:, :channels] - other[:, :channels]).abs().mean(1)  # (B, H, W)
    return adaptive_avg_pool2d(difference, (grid.height, grid.width)).flatten(1)


def _channels(method: str, description: Description, channels: int, pixels: int) -> int:
    """Predicted channels without those of a learned variance.

    Patch embedding and output projection cost pixels * width * (channels in + channels out) a token.
    """
    entering = description.per_token // (pixels * description.width) - channels
    for own in (channels, channels / 2):
        if entering in (own, 2 * own + 1):  # an inpainting model sees the masked picture and the mask, too
            return int(own)
    raise DiffratioError(
        f"{method} cannot tell the noise among {channels} predicted channels of {description.family}: it takes "
        "as many as the sample has, or twice as many (learned variance)"
    )
