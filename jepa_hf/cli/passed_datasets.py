"""Data sets that `pretrain` receives from Python, as the sources of a run."""

from collections.abc import Sequence
from typing import Any

import datasets

from ..data.arguments import PASSED_DATASET
from ..errors import UsageError
from ..training.inputs import check_single_split


def set_datasets(data_args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Use data sets instead of files or a Hub name.

    Args:
        data_args: arguments of the data, changed in place.
        train_dataset: a `Dataset`, an `IterableDataset`, a data set of torch, or a list of rows.
        eval_dataset: another one, or None.

    Raises:
        UsageError: another source is named, too, or a value is not a data set.
    """
    for name in ("train_file", "dataset_name"):
        if getattr(data_args, name):
            raise UsageError(f"train_dataset and {name} exclude each other; give one of them")
    check_single_split(train_dataset)
    data_args.splits = {data_args.dataset_train_split: _as_dataset("train_dataset", train_dataset)}
    if eval_dataset is not None:
        if data_args.validation_file:
            raise UsageError("eval_dataset and validation_file exclude each other; give one of them")
        if isinstance(eval_dataset, dict):
            raise UsageError("eval_dataset must be one data set; several by name are for JepaTrainer(eval_dataset=...)")
        data_args.splits[data_args.dataset_validation_split or "validation"] = _as_dataset("eval_dataset", eval_dataset)
    data_args.dataset_name = PASSED_DATASET
    if isinstance(data_args.splits[data_args.dataset_train_split], datasets.IterableDataset):
        data_args.streaming = True


def _as_dataset(name: str, rows: Any) -> datasets.Dataset | datasets.IterableDataset:
    if isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return rows
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise UsageError(f"{name} must be a data set or a list of rows, not a {type(rows).__name__}")
    listed: Sequence[Any] = [rows[index] for index in range(len(rows))]
    if listed and isinstance(listed[0], str):
        return datasets.Dataset.from_dict({"text": listed})
    if not listed or not isinstance(listed[0], dict):
        kind = type(listed[0]).__name__ if listed else "none"
        raise UsageError(f"{name} must hold rows that are dictionaries or texts; its rows are of the type {kind}")
    return datasets.Dataset.from_list(listed)
