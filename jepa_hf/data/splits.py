"""Training and validation splits: sources, held-out rows and sample limits."""

from collections.abc import Callable, Sized
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import logging as hub_logging

from ..errors import UsageError, one_line
from .arguments import BaseDataArguments

# A Dataset, an IterableDataset, or a list of rows.
Rows = TypeVar("Rows")


def resolve_splits(
    args: BaseDataArguments,
    *,
    seed: int,
    need_validation: bool,
    load_files: Callable[[str], Rows],
    load_split: Callable[[Any, str], Rows],
    load_default: Callable[[], Rows] | None = None,
    streaming: bool = False,
) -> tuple[Rows, Rows | None]:
    """Load the training rows and, if needed, the validation rows that `args` specifies.

    Training rows come from `dataset_name` or `train_file`, without either from `load_default`.
    Validation rows come from `validation_file`, else from the validation split of `dataset_name`,
    else `validation_split_percentage` of the training rows are held out (see `train_validation_split`). Finally
    both are cut to `max_train_samples` and `max_eval_samples`. `load_files` receives the name of the argument that
    lists the files, `load_split` a split and its name.

    Returns:
        The training and the validation rows; None for the latter unless `need_validation`.

    Raises:
        UsageError: Several sources or no source, a missing split, or nothing that can be held out.
    """
    splits: dict[str, Any] = {}
    if args.dataset_name is not None and args.train_file is not None:
        raise UsageError("dataset_name and train_file exclude each other. Set only one of them.")
    if args.dataset_name is not None:
        splits = load_hub_dataset(args, streaming=streaming)
        train = load_split(pick_split(splits, args.dataset_train_split, args), args.dataset_train_split)
    elif args.train_file is not None:
        train = load_files("train_file")
    elif load_default is not None:
        train = load_default()
    else:
        raise UsageError("There is no training data. Set --train_file or --dataset_name.")

    if not need_validation:
        return limit_samples(train, None, args)
    validation_split = args.dataset_validation_split or "validation"
    if args.validation_file is not None:
        validation = load_files("validation_file")
    elif splits and (args.dataset_validation_split or validation_split in splits):
        validation = load_split(pick_split(splits, validation_split, args), validation_split)
    else:
        train, validation = train_validation_split(train, args.validation_split_percentage, seed)
    return limit_samples(train, validation, args)


def dataset_from_pandas(frame: pd.DataFrame, name: str) -> Dataset:
    """Convert a DataFrame without its index; `name` describes it in errors.

    Raises:
        UsageError: Columns repeat, or a column has values that Arrow does not store.
    """
    if not frame.columns.is_unique:
        repeated = frame.columns[frame.columns.duplicated()][0]
        raise UsageError(f"{name} has the column {repeated!r} more than once. Rename or remove one.")
    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UsageError(
            f"{name} cannot be converted to a data set: {one_line(error):.200}. Give each column one type."
        ) from None


def load_hub_dataset(args: BaseDataArguments, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """Return the data sets that were passed from Python, or load all splits of `args.dataset_name`.

    Raises:
        UsageError: The dataset cannot be loaded.
    """
    if args.splits is not None:
        return args.splits
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the client reports every retry
    try:
        return load_dataset(
            args.dataset_name,
            args.dataset_config_name,
            streaming=streaming,
            cache_dir=args.cache_dir,
            token=args.token,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = dataset_error_reason(error)
        if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason:
            reason = "the Hub cannot be reached"
        raise UsageError(
            f"dataset_name '{args.dataset_name}' cannot be loaded: {reason}; name another dataset, or local files with "
            "--train_file."
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def dataset_error_reason(error: Exception) -> str:
    """Return the reason of an error of `datasets`: of a failed generation, that of its cause."""
    return str(error.__cause__ or error).splitlines()[0].rstrip(".")


def pick_split(splits: dict[str, Any], split: str, args: BaseDataArguments) -> Any:
    """Return one of the splits of `args.dataset_name`, or raise a `UsageError` that lists them."""
    if split not in splits:
        raise UsageError(f"Dataset '{args.dataset_name}' has no split '{split}'. Its splits are: {', '.join(splits)}.")
    return splits[split]


def train_validation_split(rows: Rows, percentage: int, seed: int) -> tuple[Rows, Rows]:
    """Set 1 to 99 % of the rows apart for validation: at least one, and not all.

    The choice depends only on the number of rows and the seed. Both parts, the remaining and the held-out rows, keep
    their order, because `concat` joins texts in order.

    Raises:
        UsageError: There are fewer than two rows, or `rows` is a stream.
    """
    if isinstance(rows, IterableDataset):
        raise UsageError("A stream cannot be split. Set --validation_file to evaluate.")
    size = len(cast(Sized, rows))
    if size < 2:
        raise UsageError(
            "A single row cannot be split into training and validation. Provide more data, or set --validation_file."
        )
    num_held_out = min(max(round(size * percentage / 100), 1), size - 1)
    held_out = np.zeros(size, dtype=bool)
    held_out[np.random.default_rng(seed).choice(size, num_held_out, replace=False)] = True
    return _select(rows, np.flatnonzero(~held_out)), _select(rows, np.flatnonzero(held_out))


def limit_samples(train: Rows, validation: Rows | None, args: BaseDataArguments) -> tuple[Rows, Rows | None]:
    """Cut both parts to `args.max_train_samples` and `args.max_eval_samples` rows."""
    if args.max_train_samples is not None:
        train = take_rows(train, args.max_train_samples)
    if args.max_eval_samples is not None and validation is not None:
        validation = take_rows(validation, args.max_eval_samples)
    return train, validation


def take_rows(rows: Rows, size: int) -> Rows:
    """Return at most `size` rows from the start of a dataset, a stream or a list."""
    if isinstance(rows, IterableDataset):
        return rows.take(size)
    return _select(rows, range(min(size, len(cast(Sized, rows)))))


def _select(rows: Any, indices: Any) -> Any:
    return [rows[index] for index in indices] if isinstance(rows, list) else rows.select(indices)
