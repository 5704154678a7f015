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


class FixedBatchSizeCollator:
    """Collate batches of `size` rows, with the entry `is_padding_row`, bool `[B]`.

    Samples are compared across ranks, whose shards of a stream end at different times: a smaller batch is padded.
    """

    def __init__(self, collator: Callable[[Sequence[Row]], dict[str, torch.Tensor]], size: int):
        self.collator, self.size = collator, size

    def __call__(self, features: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Collate rows; those without the key `is_padding_row` are real rows."""
        features = [*features, *[{**features[0], PADDING_ROW_KEY: True}] * (self.size - len(features))]
        batch = self.collator([{name: row[name] for name in row if name != PADDING_ROW_KEY} for row in features])
        # In each batch, because those of all ranks must have the same keys.
        return batch | {PADDING_ROW_KEY: torch.tensor([row.get(PADDING_ROW_KEY, False) for row in features])}
