"""Packing of several short texts into one row."""

import logging
from bisect import bisect_left, insort
from functools import partial
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Sequence, Value

from ..errors import UsageError

logger = logging.getLogger(__name__)

# Texts that share rows are out of so many, so that packing starts at once and a stream is held in little memory.
PACKING_WINDOW = 2048


def pack_dataset(
    dataset: Dataset | IterableDataset, max_seq_length: int, *, load_from_cache_file: bool = True
) -> Dataset | IterableDataset:
    """Put several rows of tokens, each whole, into each row of at most `max_seq_length`.

    Of each `PACKING_WINDOW` rows the longest comes first, and each goes where it leaves the least room (best-fit
    decreasing, as TRL's strategy "bfd"). Nothing is drawn: equal data gives equal rows. Of map-style datasets it is
    logged how many rows became how many, and how much padding is left.

    Args:
        dataset: Rows with lists of equal length in all their columns, `input_ids` among them, none longer than
            `max_seq_length`; map-style or streaming.
        load_from_cache_file: As in `tokenize_dataset`.

    Returns:
        A dataset of the same kind and columns, and the column `sequence_ids`: the number of the old row within the new
        one that each token is of.

    Raises:
        UsageError: A row is longer than `max_seq_length`.

    >>> rows = Dataset.from_dict({"input_ids": [[1], [2, 2, 2], [3, 3], [4]]})
    >>> pack_dataset(rows, 4)[:]
    {'input_ids': [[1, 2, 2, 2], [3, 3, 4]], 'sequence_ids': [[0, 1, 1, 1], [0, 0, 1]]}
    """
    features = dataset.features and Features({**dataset.features, "sequence_ids": Sequence(Value("int32"))})
    mapping: dict[str, Any] = {"batched": True, "batch_size": PACKING_WINDOW, "features": features}
    mapping["remove_columns"] = dataset.column_names or list(next(iter(dataset)))
    pack = partial(_pack_batch, max_seq_length=max_seq_length)
    if isinstance(dataset, IterableDataset):
        return dataset.map(pack, **mapping)
    packed = dataset.map(pack, load_from_cache_file=load_from_cache_file, desc="Packing", **mapping)
    tokens = pc.sum(pc.list_value_length(packed.data.column("input_ids"))).as_py()
    logger.info(
        "packed %d texts into %d rows of at most %d tokens; %.1f %% of their places are padding",
        len(dataset),
        len(packed),
        max_seq_length,
        100 * (1 - tokens / (len(packed) * max_seq_length)),
    )
    return packed


def _pack_batch(batch: dict[str, list[list[int]]], *, max_seq_length: int) -> dict[str, list[list[int]]]:
    lengths = [len(ids) for ids in batch["input_ids"]]
    if max(lengths) > max_seq_length:
        raise UsageError(
            f"a row of {max(lengths)} tokens does not fit into max_seq_length {max_seq_length}; cut it, or make that "
            "larger"
        )
    together = best_fit_decreasing(lengths, max_seq_length)
    rows = {
        name: [[value for text in texts for value in column[text]] for texts in together]
        for name, column in batch.items()
    }
    rows["sequence_ids"] = [
        [number for number, text in enumerate(texts) for _ in range(lengths[text])] for texts in together
    ]
    return rows


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Which items share a bin: from the largest to the smallest, each goes into the fullest bin that still takes it.

    Bins hold their items in order, and come in the order of their first items, so that large and small stay mixed.

    Args:
        sizes: of the items, none above `capacity`.

    >>> best_fit_decreasing([1, 3, 2, 1], capacity=4)
    [[0, 1], [2, 3]]
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room and number of each bin that has any, the fullest first
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        at = bisect_left(free, (sizes[item], 0))
        if at < len(free):
            room, number = free.pop(at)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if room > sizes[item]:
            insort(free, (room - sizes[item], number))
    return sorted(map(sorted, bins))
