"""Samples of a run's data with their labels, read again from the sources in the run's settings."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset

from ..data.arguments import PASSED_DATASET, DataArguments
from ..data.feature_columns import label_columns
from ..data.feature_datasets import load_feature_datasets
from ..data.feature_readers import is_array_file
from ..data.file_readers import file_errors_as_usage_error, file_format, find_files, read_rows
from ..data.image_datasets import load_image_datasets
from ..data.image_decoding import decode_image
from ..data.image_files import is_image_file
from ..data.splits import limit_samples, load_hub_dataset, train_validation_split
from ..data.text_datasets import load_text_datasets, text_column
from ..errors import UsageError

_LOADERS = {
    "text": ("text", load_text_datasets),
    "images": ("image", load_image_datasets),
    "features": ("features", load_feature_datasets),
}


@dataclass(frozen=True)
class RunSamples:
    """N samples of a run's data; held-out samples come first.

    Samples are texts, images as dicts of `bytes` and `path`, or arrays of features. Rows are split and row number, such
    as "validation row 12". Damaged images are counted and not among the samples.
    """

    samples: list[Any]
    rows: list[str]
    labels: list[str] | None
    held_out: int
    damaged: int = 0


def load_run_samples(
    settings: dict[str, Any], modality: str, max_samples: int, feature_column_names: Sequence[str] | None = None
) -> RunSamples:
    """Read a run's data again and draw samples from it, always the same ones.

    Held-out samples come first, then training samples up to `max_samples`. Labels are a column of
    the data (the run's `label_column_name`, or label, labels, class or target), or the folders of
    images.

    Raises:
        UsageError: the data is missing or cannot be read.
    """
    if settings.get("dataset_name") == PASSED_DATASET:
        raise UsageError("The run's data was passed to pretrain from Python, so it cannot be read again.")
    args = DataArguments(**{item.name: settings[item.name] for item in fields(DataArguments) if item.name in settings})
    seed, need_validation = int(settings.get("seed", 42)), bool(settings.get("do_eval"))
    column, loader = _LOADERS[modality]
    columns = {"column_names": feature_column_names} if modality == "features" else {}
    train, validation = loader(args, seed=seed, need_validation=need_validation, **columns)
    parts = {"validation": validation, "training": train} if validation is not None else {"training": train}
    split_labels = _labels(args, modality, seed, parts)

    samples: list[Any] = []
    rows: list[str] = []
    labels: list[str] | None = None if split_labels is None else []
    held_out = damaged = 0
    for name, part in parts.items():
        for row, sample in _draw(part, column, max_samples - len(samples), seed):
            if modality == "images" and not _is_decodable(sample):
                damaged += 1
                continue
            samples.append(sample)
            rows.append(f"{name} row {row + 1}")
            if labels is not None and split_labels is not None:
                labels.append(split_labels[name][row])
        held_out = len(samples) if name == "validation" else held_out
    if not samples:
        raise UsageError("None of the run's images can be decoded. Restore them.")
    if labels is None and modality == "images":
        labels = _folder_labels(samples)
    return RunSamples(samples, rows, labels, held_out, damaged)


def _draw(part: Dataset | IterableDataset, column: str, size: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield numbers and samples of `size` random rows in ascending order (streams: the first)."""
    if isinstance(part, IterableDataset):
        yield from ((number, row[column]) for number, row in enumerate(part.take(size)))
        return
    part = part.with_format("numpy") if column == "features" else part
    numbers = np.random.default_rng(seed).permutation(len(part))[:size]
    for number in np.sort(numbers).tolist():
        yield number, part[number][column]


def _is_decodable(stored: dict[str, Any]) -> bool:
    try:
        decode_image(stored, "RGB")
    except Exception:  # PIL's decoders raise nearly any exception on damaged data; the caller counts them
        return False
    return True


# ---- labels, which the loaders drop


def _labels(args: DataArguments, modality: str, seed: int, parts: dict[str, Any]) -> dict[str, list[str]] | None:
    """Read the labels of all rows, split as the rows were; None if the data has no labels."""
    if args.streaming or (args.train_file is None and args.dataset_name is None):
        return None
    own_validation = "validation" in parts and args.validation_file is not None
    if args.train_file is not None:
        sources = [_file_labels(files, args, modality) for files in (args.train_file, args.validation_file) if files]
    else:
        splits = load_hub_dataset(args)
        held_out = args.dataset_validation_split or "validation"
        own_validation = "validation" in parts and (args.validation_file is not None or held_out in splits)
        names = [args.dataset_train_split]
        if args.validation_file is None and own_validation:
            names.append(held_out)
        sources = [_split_labels(splits[name], args, modality) for name in names]
        if args.validation_file is not None and "validation" in parts:
            sources.append(_file_labels(args.validation_file, args, modality))
    if None in sources:
        return None
    train, validation = (Dataset.from_dict({"label": source}) for source in (*sources[:2], [])[:2])
    if not own_validation and "validation" in parts:
        train, validation = train_validation_split(train, args.validation_split_percentage, seed)
    labels = dict(zip(("training", "validation"), limit_samples(train, validation, args), strict=True))
    if any(len(labels[name]) != len(part) for name, part in parts.items()):
        return None
    return {name: labels[name]["label"][:] for name in parts}


def _file_labels(files: str, args: DataArguments, modality: str) -> list[str] | None:
    """Read the labels of tables in the order of their rows."""
    if os.path.isdir(files):
        return None
    labels: list[str] = []
    for path in find_files("train_file", files):
        if is_array_file(path) or is_image_file(path):
            return None
        kind = file_format(path)
        text = text_column(path, kind, args.text_column_name) if modality == "text" else None
        with file_errors_as_usage_error(path):
            for row in read_rows(path, kind):
                if text is not None and not (row.get(text) or "").strip():
                    continue  # the loader drops blank texts too
                name = _label_column(row, args)
                if name is None:
                    return None
                labels.append(str(row[name]))
    return labels


def _split_labels(split: Dataset, args: DataArguments, modality: str) -> list[str] | None:
    """Read the labels of a dataset's split; classes by their names."""
    name = _label_column(split.features, args)
    if name is None:
        return None
    kind, labels = split.features[name], split[name][:]
    names = (
        [kind.int2str(label) if label >= 0 else "none" for label in labels] if isinstance(kind, ClassLabel) else labels
    )
    if modality != "text":
        return [str(label) for label in names]
    text = args.text_column_name or "text"
    if text not in split.features:
        return None
    return [str(label) for label, row in zip(names, split[text], strict=True) if row is not None and row.strip()]


def _label_column(columns: Iterable[str], args: DataArguments) -> str | None:
    named = label_columns(columns, args.label_column_name) if args.label_column_name else []
    return next(iter(named or label_columns(columns)), None)


def _folder_labels(samples: list[dict[str, Any]]) -> list[str] | None:
    """Return the folder names of image files; None if all are in one folder."""
    if any(sample["path"] is None or sample["bytes"] is not None for sample in samples):
        return None
    labels = [Path(sample["path"]).parent.name for sample in samples]
    return labels if len(set(labels)) > 1 else None
