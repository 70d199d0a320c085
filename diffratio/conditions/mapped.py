"""Captions that stay on the disk: their states are read from memory maps, those of a batch alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffratio.conditions.captions import Captions
from diffratio.conditions.identity import EncoderId
from diffratio.errors import DiffratioError


@dataclass(frozen=True)
class CaptionPart:
    """Captions of one file.

    Args:
        texts: m captions.
        states: of their tokens, one after another, (tokens, C), usually a memory map.
        offsets: where each caption's tokens begin in `states`, and the end of the last, (m + 1,) int64.
    """

    texts: tuple[str, ...]
    states: Tensor
    offsets: Tensor


class MappedCaptions(Captions):
    """Captions of many files, numbered one file after another; the last number is the empty caption.

    Args:
        parts: the files.
        null: the empty caption alone.
        encoder: what made the states.

    Raises:
        DiffratioError: states that are not that encoder's.
    """

    def __init__(self, parts: Sequence[CaptionPart], null: CaptionPart, encoder: EncoderId) -> None:
        self.parts, self.encoder = [*parts, null], encoder
        self.texts = [text for part in parts for text in part.texts]
        self.null = len(self.texts)
        self._firsts, first = [], 0
        for part in self.parts:
            lengths = part.offsets.diff()
            fits = part.offsets.shape == (len(part.texts) + 1,) and part.states.ndim == 2
            if not fits or part.states.shape != (int(part.offsets[-1]), encoder.width) or len(lengths) == 0:
                raise DiffratioError(
                    f"states of shape {tuple(part.states.shape)} with {len(part.offsets)} offsets are not those of "
                    f"{len(part.texts)} captions by {encoder}; precompute them anew"
                )
            if int(lengths.min()) < 1 or int(lengths.max()) > encoder.tokens:
                raise DiffratioError(
                    f"captions of {int(lengths.min())} to {int(lengths.max())} tokens are not those of {encoder}; "
                    "precompute them anew"
                )
            self._firsts.append(first)
            first += len(part.texts)

    def arguments(self, labels: Tensor) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, T, C) float32, and `encoder_attention_mask` (B, T) int64, 1 at text."""
        numbers = labels.tolist()
        states = torch.zeros(len(numbers), self.encoder.tokens, self.encoder.width)
        mask = torch.zeros(len(numbers), self.encoder.tokens, dtype=torch.long)
        for row, number in enumerate(numbers):
            found = self._states(number)
            states[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return {
            "encoder_hidden_states": states.to(labels.device, non_blocking=True),
            "encoder_attention_mask": mask.to(labels.device, non_blocking=True),
        }

    def _states(self, number: int) -> Tensor:
        which = bisect_right(self._firsts, number) - 1
        part, own = self.parts[which], number - self._firsts[which]
        begin, end = part.offsets[own : own + 2].tolist()
        return part.states[begin:end]

    def sentences(self) -> Tensor:
        """Mean of each caption's token states, normalised to length 1, (n, C) float32."""
        means = [self._states(number).float().mean(0) for number in range(len(self))]
        return torch.nn.functional.normalize(torch.stack(means), dim=1)
