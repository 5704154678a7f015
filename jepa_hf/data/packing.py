"""Packing of several short documents into one row."""

import logging
from bisect import bisect_left, insort
from functools import partial
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Sequence, Value

from ..errors import UsageError
from ..utils.counts import counted

logger = logging.getLogger(__name__)

# Rows that are packed together: few enough to start at once and to hold a stream in little memory.
PACKING_WINDOW = 2048


def pack_dataset(
    dataset: Dataset | IterableDataset, max_seq_length: int, *, load_from_cache_file: bool = True
) -> Dataset | IterableDataset:
    """Pack several documents (rows of tokens) into each row of at most `max_seq_length`.

    Within each `PACKING_WINDOW` rows, documents are placed from the longest to the shortest, each
    where it leaves the least room (best-fit decreasing, as TRL's strategy "bfd"). Nothing is
    random. For map-style datasets, the numbers of rows and the remaining padding are logged.

    Args:
        dataset: Rows with lists of equal length in all their columns, `input_ids` among them; map-style or streaming.
        max_seq_length: Maximum tokens per row; no input row may be longer.
        load_from_cache_file: As in `tokenize_dataset`.

    Returns:
        A dataset of the same kind and columns, plus the column `document_ids`: the number of each
        token's document within its row.

    Raises:
        UsageError: A row is longer than `max_seq_length`.

    >>> rows = Dataset.from_dict({"input_ids": [[1], [2, 2, 2], [3, 3], [4]]})
    >>> pack_dataset(rows, 4)[:]
    {'input_ids': [[1, 2, 2, 2], [3, 3, 4]], 'document_ids': [[0, 1, 1, 1], [0, 0, 1]]}
    """
    features = dataset.features and Features({**dataset.features, "document_ids": Sequence(Value("int32"))})
    mapping: dict[str, Any] = {"batched": True, "batch_size": PACKING_WINDOW, "features": features}
    mapping["remove_columns"] = dataset.column_names or list(next(iter(dataset)))
    pack = partial(_pack_batch, max_seq_length=max_seq_length)
    if isinstance(dataset, IterableDataset):
        return dataset.map(pack, **mapping)
    packed = dataset.map(pack, load_from_cache_file=load_from_cache_file, desc="Packing", **mapping)
    tokens = pc.sum(pc.list_value_length(packed.data.column("input_ids"))).as_py()
    logger.info(
        "Packed %s into %s of at most %d tokens; %.1f %% of their positions are padding",
        counted(len(dataset), "text"),
        counted(len(packed), "row"),
        max_seq_length,
        100 * (1 - tokens / (len(packed) * max_seq_length)),
    )
    return packed


def _pack_batch(batch: dict[str, list[list[int]]], *, max_seq_length: int) -> dict[str, list[list[int]]]:
    lengths = [len(ids) for ids in batch["input_ids"]]
    if max(lengths) > max_seq_length:
        raise UsageError(
            f"A row of {max(lengths)} tokens does not fit into max_seq_length {max_seq_length}. Truncate it, or "
            "increase max_seq_length."
        )
    bins = best_fit_decreasing(lengths, max_seq_length)
    rows = {
        name: [[value for document in documents for value in column[document]] for documents in bins]
        for name, column in batch.items()
    }
    rows["document_ids"] = [
        [number for number, document in enumerate(documents) for _ in range(lengths[document])] for documents in bins
    ]
    return rows


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Assign items to bins, the largest first, each to the fullest bin with enough room.

    Bins hold the indices of their items in order, and are sorted by their first items, so that large and small
    items stay mixed. No size may be above `capacity`.

    >>> best_fit_decreasing([1, 3, 2, 1], capacity=4)
    [[0, 1], [2, 3]]
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room and number of each bin that is not full, the fullest first
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        index = bisect_left(free, (sizes[item], 0))
        if index < len(free):
            room, number = free.pop(index)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if room > sizes[item]:
            insort(free, (room - sizes[item], number))
    return sorted(map(sorted, bins))
