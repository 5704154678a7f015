"""Evaluation tasks: labelled samples, scored pairs of texts, and pairs for retrieval."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from ..data.feature_columns import abbreviate
from ..errors import UsageError
from .names import distinct_ends
from .task import Split, Task, TaskArguments, require_targets
from .task_columns import infer_columns, read_splits
from .task_tables import SPLIT_NAMES, read_tables

logger = logging.getLogger(__name__)

HELD_OUT = 0.25


def load_tasks(
    sources: Sequence[str], args: TaskArguments | None = None, feature_column_names: Sequence[str] | None = None
) -> list[Task]:
    """Read tasks and infer their kinds from their columns.

    A source is a file (csv, tsv, json, jsonl, parquet, each also gzipped, or npz), a folder, or a dataset on the Hub. A
    folder holds files `train.*`, `test.*` and optionally `validation.*`, or images in folders of their classes, which
    may be in folders of these names; a dataset has splits of these names. Without a test split, the validation split
    becomes the test split. From a single file or split of labelled rows, a quarter of each class is held out.

    - Columns sentence1, sentence2 and score: similarity. Only the test split is scored.
    - A column of labels and a column of texts, of images (image, img, or the only one) or columns of features:
      labels.
    - Two columns of texts (anchor and positive, query and document, question and answer, title and
      text, text and code, sentence1 and sentence2): retrieval of the second by the first. Only the
      test split is scored.

    Args:
        sources: files, folders or names on the Hub.
        args: columns and numbers of rows. Default: `TaskArguments()`.
        feature_column_names: columns of features that the encoders read (see `Embedder.feature_column_names`); others
            are left out. Default: all columns of numbers except labels and row numbers.

    Returns:
        The tasks in the order of their sources. Tasks of equal names get the shortest ends of
        their sources that tell them apart, because names are published in cards.

    Raises:
        UsageError: a source does not exist or cannot be read, its columns fit no kind of task, or
            values are missing. Also if the training rows have fewer than two classes, or none of
            those of the test rows; if they lack some, a warning counts their rows.
    """
    args = TaskArguments() if args is None else args
    tasks = [_load(source, args, feature_column_names) for source in sources]
    sources_of: dict[str, list[str]] = {}
    for task in tasks:
        sources_of.setdefault(task.name, []).append(task.source)
    names: dict[str, str] = {}
    for name, equal in sources_of.items():
        if len(set(equal)) < len(equal):
            raise UsageError(f"Task {equal[0]!r} is named twice. Name each task once.")
        names |= dict(zip(equal, distinct_ends(equal) if len(equal) > 1 else [name], strict=True))
    return [replace(task, name=names[task.source]) for task in tasks]


def _load(source: str, args: TaskArguments, feature_column_names: Sequence[str] | None) -> Task:
    tables = read_tables(source, args)
    tested = next(name for name in ("test", "validation", "train") if name in tables)
    kind, modality, columns = infer_columns(tables[tested], args)
    if kind != "labels":
        tables = {tested: tables[tested]}
    parts, names = read_splits(tables, kind, modality, columns, feature_column_names)
    task = Task(_name(source), source, kind, modality, test=parts[tested], feature_column_names=names)
    if kind == "labels":
        task = _resolve_splits(task, parts, args.seed)
    if kind == "similarity" and len(np.unique(require_targets(task.test))) < 2:
        raise UsageError(f"{tables[tested].place} has the same score in all rows. Give pairs with different scores.")
    task = replace(task, test=_subsample(task.test, args.max_test_samples, args.seed))
    if task.train is not None:
        task = replace(task, train=_subsample(task.train, args.max_train_samples, args.seed))
        _check_classes(task)
    return task


def _name(source: str) -> str:
    path = Path(source)
    stem = path.name.split(".")[0] if path.is_file() else path.name
    return path.resolve().parent.name if path.is_file() and stem in chain(*SPLIT_NAMES.values()) else stem


def _resolve_splits(task: Task, parts: dict[str, Split], seed: int) -> Task:
    """Set the disjoint splits of a task; from a single part, hold out test rows."""
    if len(parts) == 1:
        (rows,) = parts.values()
        targets = require_targets(rows)
        classes, counts = np.unique(targets, return_counts=True)
        if len(classes) > 1 and counts.min() < 2:
            raise UsageError(
                f"Task {task.source!r} has the class {str(classes[counts.argmin()])!r} in a single row, so none can be "
                "held out. Remove the row, or give a folder with files train.* and test.*."
            )
        size = max(round(HELD_OUT * len(rows)), len(classes))
        if len(rows) - size < len(classes):
            raise UsageError(f"Task {task.source!r} has too few rows ({len(rows)}) to hold some out. Add rows.")
        train, test = train_test_split(np.arange(len(rows)), test_size=size, stratify=targets, random_state=seed)
        return replace(task, train=rows.rows(np.sort(train)), test=rows.rows(np.sort(test)))
    if "test" not in parts:
        return replace(task, train=parts["train"], test=parts["validation"])
    if "train" not in parts:
        return replace(task, train=parts["validation"], test=parts["test"])
    return replace(task, train=parts["train"], validation=parts.get("validation"), test=parts["test"])


def _check_classes(task: Task) -> None:
    """Raise if the training rows have a single class, or no class of the test rows; warn if they lack some."""
    classes = np.unique(require_targets(task.train))
    if len(classes) < 2:
        raise UsageError(
            f"Task {task.source!r} has a single class in its training rows, {str(classes[0])!r}. Give rows of two or "
            "more."
        )
    for name, split in (("test", task.test), ("validation", task.validation)):
        targets = classes if split is None else require_targets(split)
        is_unknown = ~np.isin(targets, classes)
        found = _quoted(targets[is_unknown])
        if is_unknown.all():
            raise UsageError(
                f"Task {task.source!r} has no class of its training rows ({_quoted(classes)}) in its {name} rows "
                f"({found}). Write the classes alike in both."
            )
        if is_unknown.any():
            logger.warning(
                "task %r: %d of %d %s rows have a class that no training row has, and count as wrong: %s (trained: %s)",
                *(task.source, is_unknown.sum(), len(targets), name, found, _quoted(classes)),
            )


def _quoted(classes: np.ndarray) -> str:
    return abbreviate([repr(str(name)) for name in np.unique(classes)])


def _subsample(split: Split, size: int | None, seed: int) -> Split:
    """Draw rows, stratified by class if the classes are large enough."""
    if size is None or size >= len(split):
        return split
    stratify = None
    if split.targets is not None and split.targets.dtype.kind == "U":
        counts = np.unique(split.targets, return_counts=True)[1]
        if counts.min() > 1 and len(counts) <= min(size, len(split) - size):
            stratify = split.targets
    rows, _ = train_test_split(np.arange(len(split)), train_size=size, stratify=stratify, random_state=seed)
    return split.rows(np.sort(rows))
