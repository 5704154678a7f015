"""Padding of streams on several ranks to batches of one size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import torch

PADDING_ROW_KEY = "is_padding_row"
Row = dict[str, Any]


class PadStreamToMultiple(torch.utils.data.IterableDataset):
    """Pad a stream to a multiple of `size` by its first row, with `is_padding_row=True`.

    If a stream has fewer shards than ranks, each rank reads all of it and accelerate picks the
    rank's rows. It would pad the last batches itself, without marking the padded rows.

    Args:
        rows: The stream; an empty one stays empty.
        size: Rows in a batch of all ranks.

    >>> stream = datasets.Dataset.from_dict({"row": [7, 8, 9]}).to_iterable_dataset()
    >>> [tuple(row.values()) for row in PadStreamToMultiple(stream, 2)]
    [(7,), (8,), (9,), (7, True)]
    """

    def __init__(self, rows: Iterable[Row], size: int):
        self.rows, self.size = rows, size

    def set_epoch(self, epoch: int) -> None:
        """Set the stream's epoch, from which it is shuffled."""
        if isinstance(self.rows, datasets.IterableDataset):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        """Yield the stream's rows, then the padded ones."""
        first: Row = {}
        count = 0
        for row in self.rows:
            first = first or dict(row)
            count += 1
            yield row
        for _ in range(-count % self.size):
            yield {**first, PADDING_ROW_KEY: True}


def mark_padding(batch: dict[str, torch.Tensor], own: torch.Tensor) -> None:
    """Add the entry `is_padding_row`, True where `own`, bool `[B]`, is False."""
    batch[PADDING_ROW_KEY] = ~own


class FixedBatchSizeCollator:
    """Collate batches of one size, and remove padded rows from their loss.

    Samples are compared across ranks, whose shards of a stream end at different times: a smaller
    batch is padded.

    Args:
        collator: Collates batches.
        size: Rows in a batch.
        mask_rows: Removes the rows where a bool `[B]` is False from the loss of a batch, in place.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
        size: int,
        mask_rows: Callable[[dict[str, torch.Tensor], torch.Tensor], None],
    ):
        self.collator, self.size, self.mask_rows = collator, size, mask_rows

    def __call__(self, features: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Collate rows; those without the key `is_padding_row` are real rows."""
        features = [*features, *[{**features[0], PADDING_ROW_KEY: True}] * (self.size - len(features))]
        repeated = torch.tensor([feature.get(PADDING_ROW_KEY, False) for feature in features])
        batch = self.collator([{name: row[name] for name in row if name != PADDING_ROW_KEY} for row in features])
        self.mask_rows(batch, ~repeated)  # always, because batches of all ranks must have the same keys
        return batch
