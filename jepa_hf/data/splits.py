"""Datasets by name, and their splits: held-out rows and first rows."""

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import logging as hub_logging

from ..errors import UsageError
from .arguments import DataArguments


def load_named(args: DataArguments) -> dict[str, Dataset | IterableDataset]:
    """All splits of `args.dataset_name`."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the client reports every retry
    try:
        return load_dataset(
            args.dataset_name,
            args.dataset_config_name,
            streaming=args.streaming,
            cache_dir=args.cache_dir,
            token=args.token,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # Generating a dataset reports only that it failed; the cause says why.
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason:
            reason = "the Hub cannot be reached"
        raise UsageError(
            f"dataset_name '{args.dataset_name}' cannot be loaded: {reason}; give another one, or local files by "
            "--train_file"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def hold_out(dataset: Dataset, percentage: int, seed: int) -> tuple[Dataset, Dataset]:
    """Set `percentage` % of the rows apart, chosen by `seed`; both parts keep the order, which `concat` reads in."""
    if len(dataset) < 2:
        raise UsageError(
            "a single row cannot be split into training and validation; give more data or --validation_file"
        )
    size = min(max(round(len(dataset) * percentage / 100), 1), len(dataset) - 1)
    held_out = np.zeros(len(dataset), dtype=bool)
    held_out[np.random.default_rng(seed).choice(len(dataset), size, replace=False)] = True
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def first_samples(
    train: Dataset | IterableDataset, validation: Dataset | IterableDataset | None, args: DataArguments
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Both datasets, cut to `args.max_train_samples` and `args.max_eval_samples` rows."""
    if args.max_train_samples is not None:
        train = first_rows(train, args.max_train_samples)
    if args.max_eval_samples is not None and validation is not None:
        validation = first_rows(validation, args.max_eval_samples)
    return train, validation


def first_rows(dataset: Dataset | IterableDataset, size: int) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.take(size)
    return dataset.select(range(min(size, len(dataset))))
