"""Samples of the data that a run was trained on, found again through its settings, with their labels."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset

from ..data.arguments import DataArguments
from ..data.feature_datasets import load_feature_datasets
from ..data.file_readers import file_kind, find_files, naming_file, read_rows
from ..data.image_datasets import IMAGE_ENDINGS, load_image_datasets
from ..data.image_decoding import decode_image
from ..data.splits import first_samples, hold_out, load_named
from ..data.text_datasets import load_text_datasets, text_column
from ..errors import UsageError

_LOADERS = {
    "text": ("text", load_text_datasets),
    "images": ("image", load_image_datasets),
    "features": ("features", load_feature_datasets),
}
# Columns that are taken for labels where the run names none.
_LABELS = ("label", "labels", "class", "target")
_ARRAYS = (".npy", ".npz")


@dataclass(frozen=True)
class RunSamples:
    """N samples of a run's data, those that were held out of the training first.

    Args:
        samples: texts, images as dicts of `bytes` and `path`, or feature vectors or series as arrays.
        rows: where each comes from, such as "validation row 12"; rows are counted from 1.
        labels: of each sample, or None where the data has none.
        held_out: how many were held out.
        damaged: images that could not be decoded and are left out.
    """

    samples: list[Any]
    rows: list[str]
    labels: list[str] | None
    held_out: int
    damaged: int = 0


def load_run_samples(settings: dict[str, Any], modality: str, max_samples: int) -> RunSamples:
    """Read a run's data again, and draw samples from it, the same ones every time.

    Held-out samples come first; where they are fewer than `max_samples`, training samples fill up. Labels are a column
    beside the data (the run's `label_column_name`, or label, labels, class or target), or the folders of images.

    Args:
        settings: of the run, as its directory notes them.
        modality: "text", "images" or "features".
        max_samples: how many at most.

    Raises:
        UsageError: the data is not there any more or cannot be read.
    """
    args = DataArguments(**{item.name: settings[item.name] for item in fields(DataArguments) if item.name in settings})
    seed, need_validation = int(settings.get("seed", 42)), bool(settings.get("do_eval"))
    column, loader = _LOADERS[modality]
    train, validation = loader(args, seed=seed, need_validation=need_validation)
    parts = {"validation": validation, "training": train} if validation is not None else {"training": train}
    labels = _labels(args, modality, seed, parts)

    samples: list[Any] = []
    rows: list[str] = []
    chosen_labels: list[str] = []
    held_out = damaged = 0
    for name, part in parts.items():
        for row, sample in _draw(part, column, max_samples - len(samples), seed):
            if modality == "images" and not _decodes(sample):
                damaged += 1
                continue
            samples.append(sample)
            rows.append(f"{name} row {row + 1}")
            chosen_labels += [] if labels is None else [labels[name][row]]
        held_out = len(samples) if name == "validation" else held_out
    if not samples:
        raise UsageError("none of the run's images can be decoded; restore them")
    found = chosen_labels if labels is not None else _folder_labels(samples) if modality == "images" else None
    return RunSamples(samples, rows, found, held_out, damaged)


def _draw(part: Dataset | IterableDataset, column: str, size: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Row numbers and samples of at most so many random rows, in their order; of a stream the first ones."""
    if isinstance(part, IterableDataset):
        yield from ((number, row[column]) for number, row in enumerate(part.take(size)))
        return
    part = part.with_format("numpy") if column == "features" else part
    chosen = np.random.default_rng(seed).permutation(len(part))[:size]
    for number in np.sort(chosen).tolist():
        yield number, part[number][column]


def _decodes(stored: dict[str, Any]) -> bool:
    try:
        decode_image(stored, "RGB")
    except Exception:  # PIL's decoders raise nearly anything on damaged data; the caller counts
        return False
    return True


# ---- labels, which the loaders leave behind


def _labels(args: DataArguments, modality: str, seed: int, parts: dict[str, Any]) -> dict[str, list[str]] | None:
    """The label of every row of the parts, cut apart in the way that the rows were; None where there are none."""
    if args.streaming or (args.train_file is None and args.dataset_name is None):
        return None
    own_validation = "validation" in parts and args.validation_file is not None
    if args.train_file is not None:
        sources = [_file_labels(files, args, modality) for files in (args.train_file, args.validation_file) if files]
    else:
        splits = load_named(args)
        held_out = args.dataset_validation_split or "validation"
        own_validation = "validation" in parts and held_out in splits
        names = [args.dataset_train_split, held_out] if own_validation else [args.dataset_train_split]
        sources = [_split_labels(splits[name], args, modality) for name in names]
    if None in sources:
        return None
    train, validation = (Dataset.from_dict({"label": source}) for source in (*sources[:2], [])[:2])
    if not own_validation and "validation" in parts:
        train, validation = hold_out(train, args.validation_split_percentage, seed)
    labels = dict(zip(("training", "validation"), first_samples(train, validation, args), strict=True))
    if any(len(labels[name]) != len(part) for name, part in parts.items()):
        return None
    return {name: labels[name]["label"][:] for name in parts}


def _file_labels(files: str, args: DataArguments, modality: str) -> list[str] | None:
    """The labels of tables, in the order of their rows."""
    if os.path.isdir(files):
        return None
    labels: list[str] = []
    for path in find_files("train_file", files):
        if path.lower().endswith((*_ARRAYS, *IMAGE_ENDINGS)):
            return None
        kind = file_kind(path)
        text = text_column(path, kind, args.text_column_name) if modality == "text" else None
        with naming_file(path):
            for row in read_rows(path, kind):
                if text is not None and not (row.get(text) or "").strip():
                    continue  # as the loader does
                name = _label_column(row, args)
                if name is None:
                    return None
                labels.append(str(row[name]))
    return labels


def _split_labels(split: Dataset, args: DataArguments, modality: str) -> list[str] | None:
    """The labels of one split of a data set; classes by their names."""
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
    return next((name for name in (args.label_column_name, *_LABELS) if name in columns), None)


def _folder_labels(samples: list[dict[str, Any]]) -> list[str] | None:
    """The folders that image files lie in, where these are several."""
    if any(sample["path"] is None or sample["bytes"] is not None for sample in samples):
        return None
    labels = [Path(sample["path"]).parent.name for sample in samples]
    return labels if len(set(labels)) > 1 else None
