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
        pooled: state of each whole caption, (m, P); None where the encoder gives none.
    """

    texts: tuple[str, ...]
    states: Tensor
    offsets: Tensor
    pooled: Tensor | None = None


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
            fits = part.offsets.shape == (len(part.texts) + 1,) and part.states.ndim == 2 and int(part.offsets[0]) == 0
            if not fits or part.states.shape != (int(part.offsets[-1]), encoder.width) or len(lengths) == 0:
                raise DiffratioError(
                    f"states of shape {tuple(part.states.shape)} with {len(part.offsets)} offsets are not those of "
                    f"{len(part.texts)} captions by {encoder}; precompute them anew"
                )
            pooled = None if part.pooled is None else tuple(part.pooled.shape)
            if pooled != ((len(part.texts), encoder.pooled) if encoder.pooled else None):
                raise DiffratioError(
                    f"pooled states of shape {pooled} are not those of {len(part.texts)} captions by {encoder}; "
                    "precompute them anew"
                )
            least = encoder.tokens if encoder.pooled else 1  # with a pooled state padding is stored, too
            if int(lengths.min()) < least or int(lengths.max()) > encoder.tokens:
                raise DiffratioError(
                    f"captions of {int(lengths.min())} to {int(lengths.max())} tokens are not those of {encoder}; "
                    "precompute them anew"
                )
            self._firsts.append(first)
            first += len(part.texts)

    def arguments(self, labels: Tensor) -> dict[str, Tensor]:
        """As `Captions.arguments`, of states that are read from the disk."""
        numbers = labels.tolist()
        states = torch.zeros(len(numbers), self.encoder.tokens, self.encoder.width)
        mask = torch.zeros(len(numbers), self.encoder.tokens, dtype=torch.long)
        for row, number in enumerate(numbers):
            found = self._states(number)
            states[row, : len(found)] = found
            mask[row, : len(found)] = 1
        if self.encoder.pooled:
            pooled = torch.stack([self._pooled(number).float() for number in numbers])
            return {
                "encoder_hidden_states": states.to(labels.device, non_blocking=True),
                "pooled_projections": pooled.to(labels.device, non_blocking=True),
            }
        return {
            "encoder_hidden_states": states.to(labels.device, non_blocking=True),
            "encoder_attention_mask": mask.to(labels.device, non_blocking=True),
        }

    def _place(self, number: int) -> tuple[CaptionPart, int]:
        which = bisect_right(self._firsts, number) - 1
        return self.parts[which], number - self._firsts[which]

    def _states(self, number: int) -> Tensor:
        part, own = self._place(number)
        begin, end = part.offsets[own : own + 2].tolist()
        return part.states[begin:end]

    def _pooled(self, number: int) -> Tensor:
        part, own = self._place(number)
        assert part.pooled is not None
        return part.pooled[own]

    def sentences(self) -> Tensor:
        """Each caption's pooled state, or the mean of its tokens', normalised to length 1, (n, P or C) float32."""
        whole = self._pooled if self.encoder.pooled else lambda number: self._states(number).float().mean(0)
        means = [whole(number).float() for number in range(len(self))]
        return torch.nn.functional.normalize(torch.stack(means), dim=1)
