"""Evaluation tasks: labelled samples, scored pairs of texts, and pairs for retrieval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, Image
from sklearn.model_selection import train_test_split

from ..data.arguments import DataArguments
from ..data.feature_datasets import load_feature_datasets
from ..data.feature_readers import ARRAY_ERRORS
from ..data.file_readers import file_errors_as_usage_error, file_format, read_rows
from ..data.splits import load_hub_dataset
from ..errors import UsageError
from .names import LABEL_COLUMNS

Kind = Literal["labels", "similarity", "retrieval"]

HELD_OUT = 0.25
# Of each of these groups the first name present is used.
_TEXT_COLUMNS = ("text", "sentence")
_IMAGE_COLUMNS = ("image", "img")
_SCORED_PAIR = ("sentence1", "sentence2", "score")
_PAIRS = (
    ("anchor", "positive"),
    ("query", "document"),
    ("question", "answer"),
    ("title", "text"),
    ("text", "code"),
    ("sentence1", "sentence2"),
)
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
_ARRAYS = (".npz", ".npy")


@dataclass(frozen=True)
class Split:
    """Rows of a task.

    Args:
        samples: one list of samples, or for pairs two lists of the same length.
        targets: classes as strings `[N]`, or scores, float64 `[N]`; None for retrieval pairs.
    """

    samples: tuple[list[Any], ...]
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples[0])

    def rows(self, chosen: Iterable[int]) -> "Split":
        """Select rows by their numbers."""
        chosen = list(chosen)
        samples = tuple([side[row] for row in chosen] for side in self.samples)
        return Split(samples, None if self.targets is None else self.targets[chosen])


def require_targets(split: Split | None) -> np.ndarray:
    """Return the targets of a split that has to have them.

    Raises:
        ValueError: there is no split, or it has no targets.
    """
    if split is None or split.targets is None:
        raise ValueError("Expected a split with targets, got none.")
    return split.targets


@dataclass(frozen=True)
class Task:
    """Data that encoders are scored on.

    Args:
        name: name in tables.
        source: file, folder or Hub name that it was read from.
        kind: "labels" (linear probe and kNN), "similarity" (pairs with scores) or "retrieval"
            (pairs).
        modality: input of the encoder: "text", "images" or "features".
        test: rows that are scored.
        train: rows that probes are fitted on; None unless the kind is "labels".
        validation: rows to choose C of the linear probe on; None: part of `train`.
    """

    name: str
    source: str
    kind: Kind
    modality: str
    test: Split
    train: Split | None = None
    validation: Split | None = None


@dataclass(frozen=True)
class TaskArguments:
    """Columns to read and maximum numbers of rows, the same for all tasks.

    Args:
        text_column_name: column with the text, or two columns, comma-separated, with the texts of
            retrieval pairs. Default: text or sentence, else the only column other than the label.
        label_column_name: column with the labels. Default: label, labels, class or target.
        feature_column_names: columns of features, comma-separated. Default: all numeric columns but
            the label.
        max_train_samples: draw this many training rows, stratified by class. Default: all.
        max_test_samples: draw this many test rows, stratified by class if they have labels.
            Default: all.
        seed: seed of the drawn and the held-out rows.

    Raises:
        UsageError: a maximum is not positive.
    """

    text_column_name: str | None = None
    label_column_name: str | None = None
    feature_column_names: str | None = None
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Expected {name} to be at least 1, got {value}. Leave it out to use all rows.")


def load_tasks(sources: Sequence[str], args: TaskArguments | None = None) -> list[Task]:
    """Read tasks and infer their kinds from their columns.

    A source is a file (csv, tsv, json, jsonl, parquet, each also gzipped, or npz), a folder, or a
    dataset on the Hub. A folder holds files `train.*`, `test.*` and optionally `validation.*`; a
    dataset has splits of these names. Without a test split, the validation split becomes the test
    split. From a single file or split of labelled rows, a quarter of each class is held out.

    - Columns sentence1, sentence2 and score: similarity. Only the test split is scored.
    - A column of labels and a column of texts, of images (image or img) or columns of features:
      labels.
    - Two columns of texts (anchor and positive, query and document, question and answer, title and
      text, text and code, sentence1 and sentence2): retrieval of the second by the first. Only the
      test split is scored.

    Args:
        sources: files, folders or names on the Hub.
        args: columns and numbers of rows. Default: `TaskArguments()`.

    Returns:
        The tasks in the order of their sources. Tasks of equal names are named by their sources.

    Raises:
        UsageError: a source does not exist or cannot be read, its columns fit no kind of task, or
            values are missing. Also if the training rows have fewer than two classes, or lack a
            class of the test rows.
    """
    args = TaskArguments() if args is None else args
    tasks = [_load(source, args) for source in sources]
    names = [task.name for task in tasks]
    return [replace(task, name=task.source) if names.count(task.name) > 1 else task for task in tasks]


@dataclass(frozen=True)
class _Table:
    """Columns of one length, their location for error messages, and arguments to read features."""

    place: str
    columns: dict[str, list[Any]]
    folder: Path
    arguments: DataArguments

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def _load(source: str, args: TaskArguments) -> Task:
    tables = _tables(source, args)
    test = next(tables[name] for name in ("test", "validation", "train") if name in tables)
    for table in tables.values():
        if not len(table):
            raise UsageError(f"{table.place} has no rows. Give data with at least one row.")
    kind, modality, columns = _columns(test, args)
    task = Task(_name(source), source, kind, modality, test=_split(test, kind, modality, columns, args))
    if kind == "labels":
        parts = {name: _split(table, kind, modality, columns, args) for name, table in tables.items()}
        return _subsample_task(_validate_classes(_resolve_splits(task, parts, args.seed)), args)
    if kind == "similarity" and len(np.unique(require_targets(task.test))) < 2:
        raise UsageError(f"{test.place} has the same score in all rows. Give pairs with different scores.")
    return _subsample_task(task, args)


def _name(source: str) -> str:
    path = Path(source)
    stem = path.name.split(".")[0] if path.is_file() else path.name
    return path.resolve().parent.name if path.is_file() and stem in chain(*_SPLIT_NAMES.values()) else stem


# ---- reading


def _tables(source: str, args: TaskArguments) -> dict[str, _Table]:
    """Read the available splits, named train, validation and test."""
    path = Path(source)
    if path.is_file():
        return {"test": _read_file(path, args)}
    if path.is_dir():
        files = {split: _find(path, names) for split, names in _SPLIT_NAMES.items()}
        tables = {split: _read_file(file, args) for split, file in files.items() if file is not None}
        if not tables:
            raise UsageError(f"Task {source!r} is a folder without a file test.* or train.*. Name a file in it.")
        return tables
    if path.suffix or path.is_absolute():
        raise UsageError(f"Task {source!r} does not exist. Check the path.")
    try:
        splits = load_hub_dataset(DataArguments(dataset_name=source))
    except UsageError as error:
        raise UsageError(
            f"Task {source!r} is neither a file nor a folder, and no dataset was loaded: {error}"
        ) from None
    present = {split: [name for name in names if name in splits] for split, names in _SPLIT_NAMES.items()}
    if not any(present.values()):
        raise UsageError(f"Task {source!r} has no split train or test. Its splits are: {', '.join(splits)}.")
    return {split: _from_dataset(splits[names[0]], source, names[0], args) for split, names in present.items() if names}


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the file of a split, None if the folder has none."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.split(".")[0] in names)
    if len(files) > 1:
        raise UsageError(f"Folder {str(folder)!r} has {files[0].name} and {files[1].name}. Remove one of them.")
    return files[0] if files else None


def _read_file(path: Path, args: TaskArguments) -> _Table:
    place, arguments = f"'{path}'", _feature_arguments(args, train_file=str(path))
    if path.stat().st_size == 0:
        raise UsageError(f"{place} is empty. Give a file with rows.")
    if path.suffix in _ARRAYS:
        return _Table(place, _array_columns(path), path.parent, arguments)
    kind = file_format(str(path))
    with file_errors_as_usage_error(str(path)):
        rows = [row for row in read_rows(str(path), kind) if row]
    names = dict.fromkeys(name for row in rows for name in row)
    return _Table(place, {name: [row.get(name) for row in rows] for name in names}, path.parent, arguments)


def _array_columns(path: Path) -> dict[str, list[Any]]:
    """Read the one-dimensional arrays of a file, which may hold labels."""
    if path.suffix == ".npy":
        raise UsageError(f"'{path}' has no labels. Save an .npz file with the arrays features and label.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (*ARRAY_ERRORS, OSError) as error:
        raise UsageError(f"'{path}' cannot be read as arrays: {' '.join(str(error).split())}. Save it again.") from None
    return {name: array.tolist() for name, array in arrays.items() if array.ndim == 1}


def _from_dataset(dataset: Dataset, source: str, split: str, args: TaskArguments) -> _Table:
    place = f"Split '{split}' of {source!r}"
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    columns = dataset.to_dict()
    for name, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            columns[name] = [value if value is None or value < 0 else feature.int2str(value) for value in columns[name]]
    arguments = _feature_arguments(args, dataset_name=source, dataset_train_split=split)
    return _Table(place, columns, Path(), arguments)


def _feature_arguments(args: TaskArguments, **source: str) -> DataArguments:
    arguments = DataArguments(**source)  # type: ignore[arg-type]  # fields that hold strings
    return replace(arguments, label_column_name=args.label_column_name, feature_column_names=args.feature_column_names)


# ---- kinds of columns


def _columns(table: _Table, args: TaskArguments) -> tuple[Kind, str, tuple[str, ...]]:
    """Infer kind, modality, and the columns of the samples, then of the labels or scores."""
    names = table.columns
    texts = () if args.text_column_name is None else tuple(map(str.strip, args.text_column_name.split(",")))
    for name in (*texts, *([args.label_column_name] if args.label_column_name else [])):
        if name not in names:
            raise UsageError(f"{table.place} has no column {name!r}. Its columns are: {', '.join(names) or '(none)'}.")
    if len(texts) > 2:
        raise UsageError(f"Expected text_column_name to be one column, or two for pairs, got {len(texts)}.")
    if len(texts) == 2:
        return "retrieval", "text", texts
    if not texts and args.label_column_name is None and set(_SCORED_PAIR) <= set(names):
        return "similarity", "text", _SCORED_PAIR

    label = args.label_column_name or next((name for name in LABEL_COLUMNS if name in names), None)
    if label is not None:
        return "labels", *_infer_sample_columns(table, label, texts)
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    if pair is None or texts:
        raise UsageError(
            f"{table.place} has neither a column of labels nor pairs of texts. Name the labels by --label_column_name, "
            f"or the pairs by --text_column_name first,second. Its columns are: {', '.join(names) or '(none)'}."
        )
    return "retrieval", "text", pair


def _infer_sample_columns(table: _Table, label: str, texts: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Infer the modality and the columns of labelled samples (features: labels only)."""
    others = [name for name in table.columns if name != label]
    image = next((name for name in _IMAGE_COLUMNS if name in others), None)
    if image is not None and not texts:
        return "images", (image, label)
    text = next(iter(texts), None) or next((name for name in _TEXT_COLUMNS if name in others), None)
    all_text = text is None and others and all(_is_text_column(table.columns[name]) for name in others)
    if all_text and len(others) == 1:
        text = others[0]
    if text is not None:
        return "text", (text, label)
    if all_text:
        raise UsageError(
            f"{table.place} has several columns of texts: {', '.join(others)}. Name one by --text_column_name."
        )
    return "features", (label,)


def _is_text_column(values: list[Any]) -> bool:
    """Return whether the values are strings, but not the numbers of a CSV file."""
    return all(isinstance(value, str) for value in values) and not all(map(_is_number, values))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(table: _Table, kind: Kind, modality: str, columns: tuple[str, ...], args: TaskArguments) -> Split:
    for name in columns:
        if name not in table.columns:
            raise UsageError(f"{table.place} has no column {name!r}, but another split has. Add the column.")
    if modality == "features":
        samples: tuple[list[Any], ...] = (_features(table, columns[0]),)
    elif modality == "images":
        samples = ([_stored_image(value, table.folder) for value in table.columns[columns[0]]],)
    else:
        samples = tuple(_texts(table, name) for name in (columns[:1] if kind == "labels" else columns[:2]))
    if kind == "labels":
        return Split(samples, _labels(table, columns[-1]))
    return Split(samples, _scores(table, columns[2]) if kind == "similarity" else None)


def _texts(table: _Table, name: str) -> list[str]:
    for row, value in enumerate(table.columns[name]):
        if not isinstance(value, str):
            value_type = "nothing" if value is None else type(value).__name__
            raise UsageError(f"Expected a text in column {name!r}, got {value_type} in row {row + 1} of {table.place}.")
    return table.columns[name]


def _stored_image(value: Any, folder: Path) -> Any:
    """Convert to `datasets.Image(decode=False)`; paths are relative to the table's folder."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": str(folder / value)}
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        return {"bytes": None, "path": str(folder / value["path"])}
    return value


def _features(table: _Table, label: str) -> list[np.ndarray]:
    arguments = replace(table.arguments, label_column_name=label)
    rows, _ = load_feature_datasets(arguments, seed=0, need_validation=False)
    if len(rows) != len(table.columns[label]):
        raise UsageError(
            f"{table.place} has {len(rows)} rows of features, but {len(table.columns[label])} labels. Give one per row."
        )
    return [np.asarray(row) for row in rows.with_format("numpy")["features"]]


def _labels(table: _Table, name: str) -> np.ndarray:
    """Return classes as strings, so that 1 in JSON and 1 in CSV are equal."""
    classes = []
    for row, value in enumerate(table.columns[name]):
        if value is None or value == "":
            raise UsageError(f"Row {row + 1} of {table.place} has no label in column {name!r}. Remove the row.")
        if isinstance(value, float) and not value.is_integer():
            raise UsageError(
                f"Expected a class in column {name!r}, got the number {value} in row {row + 1} of {table.place}. "
                "Name a column of classes by --label_column_name."
            )
        if not isinstance(value, (str, int, float)):
            raise UsageError(
                f"Expected a class in column {name!r}, got {type(value).__name__} in row {row + 1} of {table.place}."
            )
        classes.append(str(int(value)) if isinstance(value, float) else str(value))
    return np.array(classes)


def _scores(table: _Table, name: str) -> np.ndarray:
    scores = np.empty(len(table))
    for row, value in enumerate(table.columns[name]):
        try:
            scores[row] = float(value)
        except (TypeError, ValueError, OverflowError):
            scores[row] = np.nan
        if not np.isfinite(scores[row]):
            raise UsageError(
                f"Expected a finite number in column {name!r}, got {value!r:.40} in row {row + 1} of {table.place}."
            )
    return scores


# ---- splits


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


def _validate_classes(task: Task) -> Task:
    """Raise if there is a single class, or one that no training row has."""
    classes = set(require_targets(task.train))
    if len(classes) < 2:
        raise UsageError(
            f"Task {task.source!r} has a single class in its training rows, {str(next(iter(classes)))!r}. Give rows of "
            "two or more."
        )
    for name, split in (("test", task.test), ("validation", task.validation)):
        unknown = sorted(set(require_targets(split)) - classes) if split is not None else []
        if unknown:
            raise UsageError(
                f"Task {task.source!r} has the class {str(unknown[0])!r} in its {name} rows, but not in its training "
                "rows. Give both the same classes."
            )
    return task


def _subsample_task(task: Task, args: TaskArguments) -> Task:
    train = None if task.train is None else _subsample(task.train, args.max_train_samples, args.seed)
    limited = replace(task, train=train, test=_subsample(task.test, args.max_test_samples, args.seed))
    return limited if train is None else _validate_classes(limited)


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
