"""`MaskingCollator`, the base of the collators that make two views, and what they share."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch

from ..errors import UsageError


class MaskingCollator:
    """What all collators share: a seed, an epoch that running workers see, and masks that never change in evaluation.

    A sample's masks depend on the seed, the epoch, the number of the mask and the sample's own content; on nothing
    else. So the same sample is masked alike with any batch size and any number of workers, and otherwise in the next
    epoch.

    Args:
        num_masks: masks per sample, which share one pass of the target encoder.
        seed: seed of the masks.
    """

    # Columns of the data set that it reads and the model does not.
    columns: tuple[str, ...] = ()

    def __init__(self, num_masks: int, seed: int):
        if num_masks < 1:
            raise UsageError(f"num_masks must be at least 1, not {num_masks}")
        self.num_masks = num_masks
        self.seed = seed
        # In shared memory: a persistent worker holds a copy of the collator, but the same epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Number of the epoch, which the trainer sets; workers that are already running see it too."""
        return int(self._epoch.item())

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def for_evaluation(self) -> Self:
        """A copy whose masks never change: epoch 0 of its own, and other masks than training's first epoch."""
        fixed = copy.copy(self)
        fixed.seed = self.seed + 0x5EED
        fixed._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        return fixed

    def for_training(self) -> Self:
        """The collator as a trainer uses it, which may leave out of a batch what tells its model nothing."""
        return self

    @property
    def summary(self) -> dict[str, Any]:
        """How views are made, for the model card: name and value."""
        raise NotImplementedError

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def check_span_settings(mask_ratio: float, mean_span_length: float, context_mode: str, on_short: str) -> None:
    """Refuse what no collator of spans can do.

    Raises:
        UsageError: a ratio outside (0, 1), a mean below 1, or an unknown choice.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise UsageError(f"mask_ratio must lie strictly between 0 and 1, not {mask_ratio}")
    if not mean_span_length >= 1:
        raise UsageError(f"mean_span_length must be at least 1, not {mean_span_length}")
    if context_mode not in ("kept", "dropped"):
        raise UsageError(f"context_mode must be kept or dropped, not {context_mode!r}")
    if on_short not in ("error", "skip"):
        raise UsageError(f"on_short must be error or skip, not {on_short!r}")


def mask_keys(keys: np.ndarray, num_masks: int) -> np.ndarray:
    """Keys of the masks of samples, uint64 `[B]` -> `[B * num_masks]`: those of one sample differ, the first is its."""
    numbers = np.arange(num_masks, dtype=np.uint64)
    return (keys[:, None] ^ (numbers[None, :] * np.uint64(0xD1342543DE82EF95))).reshape(-1)


def chosen_positions(chosen: np.ndarray, capacities: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the True columns of each row of a bool `[N, L]`: long `[N, K]`, filled up with 0, and their validity.

    K is the largest number in the batch, at least 1, or the smallest capacity that holds it.
    """
    counts = chosen.sum(axis=1)
    width = max(int(counts.max(initial=0)), 1)
    width = next((capacity for capacity in capacities if capacity >= width), width)
    row, column = np.nonzero(chosen)
    place = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    positions = np.zeros((chosen.shape[0], width), dtype=np.int64)
    positions[row, place] = column
    return positions, np.arange(width) < counts[:, None]
