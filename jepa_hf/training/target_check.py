"""Check of the data before a run: rows without targets teach nothing."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets

from ..errors import UsageError
from ..masking.base_collator import MaskingCollator
from ..utils.counts import counted, evenly_spaced

_MAX_ROWS = 1024
_BATCH_ROWS = 16


def check_targets(dataset: Any, collator: Any, name: str) -> None:
    """Check that some row of a data set has a target, from as few rows as possible.

    At most 1024 rows are collated: of a map-style data set evenly spaced ones, of a stream the first
    ones. Streams of other libraries, which may be read only once, are not checked.

    Args:
        dataset: Rows for the collator, a dictionary of data sets, or None.
        collator: The run's; one that is not a `MaskingCollator` is not called.
        name: Of the data, for the error.

    Raises:
        UsageError: None of these rows has a target, or a stream has no rows.
    """
    if isinstance(dataset, dict):
        for part_name, part in dataset.items():
            check_targets(part, collator, f"{name} {part_name!r}")
        return
    if not isinstance(collator, MaskingCollator):
        return
    rows, count = _sample(dataset), 0
    while batch := list(islice(rows, _BATCH_ROWS)):
        if collator(batch)["target_valid"].any():
            return
        count += len(batch)
    if not count and isinstance(dataset, datasets.IterableDataset):
        raise UsageError(f"The stream of {name} has no rows. {collator.target_requirement}")
    if count:
        raise UsageError(
            f"None of {counted(count, 'row')} of the {name} has a target to predict. {collator.target_requirement}"
        )


def _sample(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, datasets.IterableDataset):
        return islice(iter(dataset), _MAX_ROWS)
    if not hasattr(dataset, "__len__"):
        return iter(())
    return (dataset[index] for index in evenly_spaced(len(dataset), _MAX_ROWS))
