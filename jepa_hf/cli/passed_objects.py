"""Models and data sets that `pretrain` receives from Python, as the start and the sources of a run."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import pandas as pd
from transformers import PreTrainedModel

from ..data.arguments import PASSED_DATASET
from ..data.splits import dataset_from_pandas
from ..errors import UsageError
from ..models.encoder_adapters import encoder_adapter_for
from ..training.defaults import load_processing_class
from ..training.inputs import check_single_split
from ..utils.types import ProcessingClass


@contextmanager
def model_directory(model: Any, processing_class: ProcessingClass | None) -> Iterator[tuple[Any, str | None]]:
    """Save a model of transformers to a temporary directory, from which a run starts as from any other.

    A name or None are passed on as they are. The default tokenizer or image processor is that of the directory or Hub
    name from which the model was loaded.

    Yields:
        The directory, and the value of `BaseModelArguments.passed_model`.
    """
    if model is None or isinstance(model, (str, os.PathLike)):
        if processing_class is not None:
            raise UsageError("processing_class is for a model object. Name a tokenizer with tokenizer_name.")
        yield model, None
        return
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"model must be a model of transformers, or a directory or Hub name, not a {type(model).__name__}."
        )
    modality = encoder_adapter_for(getattr(model.config, "encoder_config", model.config)).modality
    if processing_class is None and modality != "features":
        if not model.name_or_path:
            kind = "a tokenizer" if modality == "text" else "an image processor"
            raise UsageError(f"The {type(model).__name__} comes without {kind}. Pass it as processing_class=...")
        processing_class = load_processing_class(model.name_or_path, modality)
    with tempfile.TemporaryDirectory() as folder:
        for part in (model, processing_class):
            if part is not None:
                part.save_pretrained(folder)
        yield folder, model.name_or_path


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the bars of `datasets` as on the command line, unless its verbosity is set to info or debug."""
    is_quiet = datasets.logging.get_verbosity() >= logging.WARNING and not sys.stderr.isatty()
    if not is_quiet or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def set_datasets(data_args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Use data sets instead of files or a Hub name.

    They may be a `Dataset`, an `IterableDataset`, a DataFrame, a data set of torch, or a list of rows.
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
    if isinstance(rows, pd.DataFrame):
        return dataset_from_pandas(rows, name)
    if isinstance(rows, (str, bytes)) or not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise UsageError(f"{name} must be a data set or a list of rows, not a {type(rows).__name__}")
    listed: Sequence[Any] = [rows[index] for index in range(len(rows))]
    if listed and isinstance(listed[0], str):
        return datasets.Dataset.from_dict({"text": listed})
    if not listed or not isinstance(listed[0], dict):
        kind = type(listed[0]).__name__ if listed else "none"
        raise UsageError(f"{name} must hold rows that are dictionaries or texts; its rows are of the type {kind}")
    return datasets.Dataset.from_list(listed)
