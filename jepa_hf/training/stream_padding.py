"""Streams on several ranks: batches of one size, in which nothing is learnt from rows that fill them up."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import torch

REPEATED = "repeated"
Row = dict[str, Any]


class WholeBatches(torch.utils.data.IterableDataset):
    """A stream whose length becomes a multiple of `size`, by its first row again and again, which says `repeated`.

    Of a stream with fewer shards than ranks, accelerate gives each rank its part of every so many rows, and would fill
    up the last ones itself, without a sign. Each rank reads the whole stream.

    Args:
        rows: the stream; of an empty one nothing is repeated.
        size: rows in a batch of all ranks.

    >>> stream = datasets.Dataset.from_dict({"row": [7, 8, 9]}).to_iterable_dataset()
    >>> [tuple(row.values()) for row in WholeBatches(stream, 2)]
    [(7,), (8,), (9,), (7, True)]
    """

    def __init__(self, rows: datasets.IterableDataset, size: int):
        self.rows, self.size = rows, size

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        first, count = {}, 0
        for row in self.rows:
            first = first or dict(row)
            count += 1
            yield row
        for _ in range(-count % self.size):
            yield {**first, REPEATED: True}


class WholeBatchCollator:
    """A collator whose batches are all of one size; of rows that were read before nothing is learnt.

    Samples are compared across ranks, whose shards of a stream do not end at the same time: a smaller batch is filled
    up as the stream is.

    Args:
        collator: makes batches.
        size: rows in a batch.
        leave_out: changes a batch so that nothing is learnt from the rows where a bool `[B]` is False.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
        size: int,
        leave_out: Callable[[dict[str, torch.Tensor], torch.Tensor], None],
    ):
        self.collator, self.size, self.leave_out = collator, size, leave_out

    def __call__(self, features: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Collate; rows without `repeated` were not."""
        features = [*features, *[{**features[0], REPEATED: True}] * (self.size - len(features))]
        repeated = torch.tensor([feature.get(REPEATED, False) for feature in features])
        batch = self.collator([{name: row[name] for name in row if name != REPEATED} for row in features])
        self.leave_out(batch, ~repeated)  # if none, too: another rank's batch may have some, and they gather alike
        return batch
