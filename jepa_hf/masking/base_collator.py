"""`MaskingCollator`, the base class of the collators, and their shared functions."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from ..errors import UsageError
from ..models.argument_owners import owner_of_argument
from ..utils.keywords import ChecksKeywords
from .span_sampling import check_span_settings


def check_mask_settings(num_masks: int | None, on_too_short: str | None = None) -> None:
    """Raise a `UsageError` for less than one mask, or an unknown choice; None stands for a default."""
    if num_masks is not None and num_masks < 1:
        raise UsageError(f"num_masks must be at least 1, not {num_masks}.")
    if on_too_short not in (None, "error", "skip"):
        raise UsageError(f"on_too_short must be error or skip, not {on_too_short!r}.")


class MaskingCollator(ChecksKeywords):
    """Base class of the collators: seed, epoch shared with workers, fixed masks in evaluation.

    A sample's masks depend only on the seed, the epoch, the index of the mask and the sample's
    content. Neither the batch size nor the number of workers changes them; each epoch does.

    Args:
        num_masks: Masks per sample. They share one pass of the target encoder.
        seed: Seed of the masks.

    Raises:
        UsageError: `num_masks` is below 1.
    """

    # Columns of the data set that the collator reads and the model does not.
    extra_columns: tuple[str, ...] = ()
    _owner_of = staticmethod(owner_of_argument)

    def __init__(self, num_masks: int, seed: int):
        check_mask_settings(num_masks)
        self.num_masks = num_masks
        self.seed = seed
        # In shared memory: a persistent worker holds a copy of the collator, but must see the same epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Number of the epoch. The trainer sets it, also for workers that are already running."""
        return int(self._epoch.item())

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def for_evaluation(self) -> Self:
        """Return a copy whose epoch stays 0, with other masks than in training."""
        evaluation = copy.copy(self)
        evaluation.seed = self.seed + 0x5EED
        evaluation._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        return evaluation

    def for_training(self) -> Self:
        """Return the collator that a trainer uses, which may omit redundant entries of a batch."""
        return self

    @property
    def card_settings(self) -> dict[str, Any]:
        """Settings of the views for the model card, by name."""
        raise NotImplementedError

    @property
    def target_requirement(self) -> str:
        """Condition of a row that has targets, and the remedy for data without such rows."""
        raise NotImplementedError

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate the rows of a batch."""
        raise NotImplementedError


class SpanMaskingCollator(MaskingCollator):
    """Base class of the collators that mask spans of tokens, steps or patches.

    Raises:
        UsageError: A ratio outside (0, 1), a mean below 1, or an unknown choice.
    """

    def __init__(
        self,
        mask_ratio: float,
        mean_span_length: float,
        masked_tokens: str | None,
        num_masks: int,
        on_too_short: str,
        max_length: int | None,
        seed: int,
    ):
        check_span_settings(mask_ratio, mean_span_length)
        if masked_tokens not in ("mask_token", "drop", None):
            raise UsageError(f"masked_tokens must be drop or mask_token, not {masked_tokens!r}.")
        check_mask_settings(num_masks, on_too_short)
        super().__init__(num_masks, seed)
        self.mask_ratio = mask_ratio
        self.mean_span_length = mean_span_length
        self.masked_tokens = masked_tokens
        self.on_too_short = on_too_short
        self.max_length = max_length

    def for_model(self, masked_tokens: str) -> Self:
        """Return the collator for a model's `masked_tokens`, which it takes over if it has none of its own.

        Raises:
            UsageError: It has another.
        """
        if self.masked_tokens == masked_tokens:
            return self
        if self.masked_tokens is not None:
            raise UsageError(
                f"The collator has masked_tokens {self.masked_tokens!r}, but the model {masked_tokens!r}. Leave "
                "masked_tokens of the collator out, then it is the model's."
            )
        collator = copy.copy(self)
        collator.masked_tokens = masked_tokens
        return collator

    @property
    def card_settings(self) -> dict[str, Any]:
        """Settings of the views for the model card, by name."""
        return {"mask ratio": self.mask_ratio, "mean span length": self.mean_span_length}

    def _context(
        self,
        name: str,
        masks: np.ndarray,
        positions: np.ndarray,
        masked_view: Callable[[], np.ndarray],
        capacities: tuple[int, ...],
    ) -> dict[str, np.ndarray]:
        """Return the context's entries of a batch.

        Args:
            name: Of the entry that holds the clean samples.
            masks: bool `[B, M, L]`.
            positions: bool `[B, L]`, False on padding.
            masked_view: Returns the samples with replaced masked positions, `[B, M, ...]`.
            capacities: Allowed numbers of visible positions, see `pad_true_indices`.
        """
        if self.masked_tokens != "mask_token":
            return padded_positions("context", positions[:, None] & ~masks, capacities)
        view = masked_view()
        return {f"context_{name}": view[:, 0] if self.num_masks == 1 else view}


def derive_mask_keys(keys: np.ndarray, num_masks: int) -> np.ndarray:
    """Derive a different key for each mask of a sample, uint64 `[B]` -> `[B * num_masks]`.

    The first of them is the sample's own key.
    """
    numbers = np.arange(num_masks, dtype=np.uint64)
    return (keys[:, None] ^ (numbers[None, :] * np.uint64(0xD1342543DE82EF95))).reshape(-1)


def pad_true_indices(chosen: np.ndarray, capacities: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Return the column indices of the True entries of each row, padded with 0, and their validity.

    Args:
        chosen: bool `[N, L]`.
        capacities: Allowed widths K, ascending. The smallest sufficient one is used, or else the
            largest number of True entries in a row, at least 1.

    Returns:
        long `[N, K]` and bool `[N, K]`.
    """
    counts = chosen.sum(axis=1)
    width = max(int(counts.max(initial=0)), 1)
    width = next((capacity for capacity in capacities if capacity >= width), width)
    row, column = np.nonzero(chosen)
    index = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    positions = np.zeros((chosen.shape[0], width), dtype=np.int64)
    positions[row, index] = column
    return positions, np.arange(width) < counts[:, None]


def padded_positions(name: str, chosen: np.ndarray, capacities: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Return `[B, M, K]` positions of the True entries of `[B, M, L]` and their validity, as entries of a batch."""
    batch, masks, length = chosen.shape
    positions, valid = pad_true_indices(chosen.reshape(batch * masks, length), capacities)
    shape = (batch, masks, positions.shape[1])
    return {f"{name}_positions": positions.reshape(shape), f"{name}_valid": valid.reshape(shape)}


def to_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Convert the entries of a batch."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def without_padding(mask: np.ndarray, number: int, noun: str | None) -> slice:
    """Return the slice of row `number` from the first to the last position that its mask marks.

    Raises:
        UsageError: The mask hides positions in between, which are called `noun`; None allows it.
    """
    positions = np.flatnonzero(mask)
    own = slice(positions[0], positions[-1] + 1) if positions.size else slice(0)
    if noun is not None and not mask[own].all():
        raise UsageError(
            f"Row {number} of the batch has an attention_mask with zeros between its {noun}. Remove the hidden {noun}; "
            "only padding at the ends is supported."
        )
    return own
