"""What frozen encoders are judged on: labelled samples, scored pairs of texts and pairs that belong together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, Image
from sklearn.model_selection import train_test_split

from ..data.arguments import DataArguments
from ..data.feature_datasets import load_feature_datasets
from ..data.feature_readers import ARRAY_ERRORS
from ..data.file_readers import file_kind, naming_file, read_rows
from ..data.splits import load_named
from ..errors import UsageError

Kind = Literal["labels", "similarity", "retrieval"]

HELD_OUT = 0.25
# The first name that is there is taken.
_TEXT_COLUMNS = ("text", "sentence")
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "class", "target")
_SCORED_PAIR = ("sentence1", "sentence2", "score")
_PAIRS = (
    ("anchor", "positive"),
    ("query", "document"),
    ("question", "answer"),
    ("title", "text"),
    ("text", "code"),
    ("sentence1", "sentence2"),
)
_VALIDATION_NAMES = ("validation", "valid", "dev")
_ARRAYS = (".npz", ".npy")


@dataclass(frozen=True)
class Split:
    """Rows of a task.

    Args:
        samples: one list of samples, or two of the same length, where rows are pairs.
        targets: the class of each row, as a string, or its score, float64; None where rows are pairs that belong
            together.
    """

    samples: tuple[list[Any], ...]
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples[0])

    def rows(self, chosen: Iterable[int]) -> "Split":
        """These rows only."""
        chosen = list(chosen)
        samples = tuple([side[row] for row in chosen] for side in self.samples)
        return Split(samples, None if self.targets is None else self.targets[chosen])


@dataclass(frozen=True)
class Task:
    """Something that encoders are judged on.

    Args:
        name: what it is called in tables.
        source: the file, folder or Hub name that it comes from.
        kind: "labels" (linear probe and kNN), "similarity" (pairs with scores) or "retrieval" (pairs).
        modality: what an encoder has to read: "text", "images" or "features".
        test: what is scored.
        train: what probes are fitted on; of "labels" only.
        validation: what a probe's penalty is chosen on; None where a part of `train` is to serve.
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
    """Which columns to read, and how many rows; the same for all tasks.

    Args:
        text_column_name: the column with the text, or two with a comma between them: pairs that belong together.
            Default: text or sentence, or the only column beside the label.
        label_column_name: default label, labels, class or target.
        feature_column_names: columns of features, with commas; default all numbers but the label.
        max_train_samples, max_test_samples: draw so many rows, of labelled ones with the shares of the classes kept;
            default all.
        seed: of what is drawn and held out.

    Raises:
        UsageError: a number of rows that is not positive.
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
                raise UsageError(f"{name} must be at least 1, not {value}; leave it out for all rows")


def load_tasks(sources: Sequence[str], args: TaskArguments | None = None) -> list[Task]:
    """Read tasks; what each is, its columns tell.

    A source is a file (csv, tsv, json, jsonl, parquet, each also gzipped, or npz), a folder with files `train.*` and
    `test.*` and perhaps `validation.*`, or a data set on the Hub with such splits. Without a test split the validation
    split is the test; a single file or split of labelled rows is divided, a quarter of each class being held out.

    - columns sentence1, sentence2 and score: similarity. Only the test split is read.
    - a column of labels beside a column of texts, images (image or img) or features: labels.
    - two columns of texts (anchor and positive, query and document, question and answer, title and text, text and
      code, sentence1 and sentence2): retrieval of the second by the first. Only the test split is read.

    Raises:
        UsageError: a source that is not there or cannot be read, columns that make no task, missing values, a single
            class, or classes to test on that cannot be learnt.
    """
    args = TaskArguments() if args is None else args
    tasks = [_load(source, args) for source in sources]
    names = [task.name for task in tasks]
    return [replace(task, name=task.source) if names.count(task.name) > 1 else task for task in tasks]


@dataclass(frozen=True)
class _Table:
    """Columns of one length; `place` is where they come from, as errors call it, `arguments` how to read features."""

    place: str
    columns: dict[str, list[Any]]
    folder: Path
    arguments: DataArguments

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def _load(source: str, args: TaskArguments) -> Task:
    tables = _tables(source, args)
    test = tables.get("test", tables.get("validation", tables.get("train")))
    for table in tables.values():
        if not len(table):
            raise UsageError(f"{table.place} has no rows; give data with at least one")
    kind, modality, columns = _columns(test, args)
    task = Task(_name(source), source, kind, modality, test=_split(test, kind, modality, columns, args))
    if kind == "labels":
        parts = {name: _split(table, kind, modality, columns, args) for name, table in tables.items()}
        return _limited(_checked(_with_train(task, parts, args.seed)), args)
    if kind == "similarity" and len(np.unique(task.test.targets)) < 2:
        raise UsageError(f"{test.place} has the same score in all rows; give pairs with different ones")
    return _limited(task, args)


def _name(source: str) -> str:
    path = Path(source)
    stem = path.name.split(".")[0] if path.is_file() else path.name
    return path.resolve().parent.name if path.is_file() and stem in ("train", "test", *_VALIDATION_NAMES) else stem


# ---- reading


def _tables(source: str, args: TaskArguments) -> dict[str, _Table]:
    """The splits that there are: train, validation, test."""
    path = Path(source)
    if path.is_file():
        return {"test": _read_file(path, args)}
    if path.is_dir():
        files = {name: _find(path, names) for name, names in _split_names().items()}
        tables = {name: _read_file(file, args) for name, file in files.items() if file is not None}
        if not tables:
            raise UsageError(f"task {source!r} is a folder without a file test.* or train.*; name a file in it")
        return tables
    if path.suffix or path.is_absolute():
        raise UsageError(f"task {source!r} does not exist; check the path")
    try:
        splits = load_named(DataArguments(dataset_name=source))
    except UsageError as error:
        reason = str(error).partition("cannot be loaded: ")[2].partition(";")[0]
        raise UsageError(
            f"task {source!r} is no file, no folder and no data set that can be loaded ({reason}); check the name"
        ) from None
    named = {split: next((name for name in names if name in splits), None) for split, names in _split_names().items()}
    if not any(named.values()):
        raise UsageError(f"task {source!r} has no split train or test; its splits are: {', '.join(splits)}")
    return {split: _from_dataset(splits[name], source, name, args) for split, name in named.items() if name is not None}


def _split_names() -> dict[str, tuple[str, ...]]:
    return {"train": ("train",), "validation": _VALIDATION_NAMES, "test": ("test",)}


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of a split."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name.split(".")[0] in names)
    if len(found) > 1:
        raise UsageError(f"folder {str(folder)!r} has {found[0].name} and {found[1].name}; leave one of them")
    return found[0] if found else None


def _read_file(path: Path, args: TaskArguments) -> _Table:
    place, arguments = f"'{path}'", _feature_arguments(args, train_file=str(path))
    if path.stat().st_size == 0:
        raise UsageError(f"{place} is empty; give a file with rows")
    if path.suffix in _ARRAYS:
        return _Table(place, _array_columns(path), path.parent, arguments)
    kind = file_kind(str(path))
    with naming_file(str(path)):
        rows = [row for row in read_rows(str(path), kind) if row]
    names = dict.fromkeys(name for row in rows for name in row)
    return _Table(place, {name: [row.get(name) for row in rows] for name in names}, path.parent, arguments)


def _array_columns(path: Path) -> dict[str, list[Any]]:
    """The arrays of a file that can hold labels; the features are read by whoever reads features."""
    if path.suffix == ".npy":
        raise UsageError(f"'{path}' has no labels; save an .npz file with the arrays features and label")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (*ARRAY_ERRORS, OSError) as error:
        raise UsageError(f"'{path}' cannot be read as arrays: {' '.join(str(error).split())}") from None
    return {name: array.tolist() for name, array in arrays.items() if array.ndim == 1}


def _from_dataset(dataset: Dataset, source: str, split: str, args: TaskArguments) -> _Table:
    place = f"split '{split}' of {source!r}"
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
    return DataArguments(
        label_column_name=args.label_column_name, feature_column_names=args.feature_column_names, **source
    )


# ---- what the columns are


def _columns(table: _Table, args: TaskArguments) -> tuple[Kind, str, tuple[str, ...]]:
    """The kind of task, what is read, and the columns: of samples, then of labels or scores."""
    names = table.columns
    wanted = () if args.text_column_name is None else tuple(map(str.strip, args.text_column_name.split(",")))
    for name in (*wanted, *([args.label_column_name] if args.label_column_name else [])):
        if name not in names:
            raise UsageError(f"{table.place} has no column {name!r}; its columns are: {', '.join(names) or '(none)'}")
    if len(wanted) > 2:
        raise UsageError(f"text_column_name takes one column, or two for pairs, not {len(wanted)}")
    if len(wanted) == 2:
        return "retrieval", "text", wanted
    if not wanted and args.label_column_name is None and set(_SCORED_PAIR) <= set(names):
        return "similarity", "text", _SCORED_PAIR

    label = args.label_column_name or next((name for name in _LABEL_COLUMNS if name in names), None)
    if label is not None:
        return "labels", *_samples_beside(table, label, wanted)
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    if pair is None or wanted:
        raise UsageError(
            f"{table.place} has neither a column of labels nor pairs of texts, out of: {', '.join(names) or '(none)'}; "
            "name them by --label_column_name, or pairs by --text_column_name first,second"
        )
    return "retrieval", "text", pair


def _samples_beside(table: _Table, label: str, wanted: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """What lies beside the labels, and the columns of both; those of features are found by whoever reads them."""
    others = [name for name in table.columns if name != label]
    image = next((name for name in _IMAGE_COLUMNS if name in others), None)
    if image is not None and not wanted:
        return "images", (image, label)
    text = next(iter(wanted), None) or next((name for name in _TEXT_COLUMNS if name in others), None)
    prose = text is None and others and all(_is_prose(table.columns[name]) for name in others)
    if prose and len(others) == 1:
        text = others[0]
    if text is not None:
        return "text", (text, label)
    if prose:
        raise UsageError(
            f"{table.place} has several columns of texts; name one by --text_column_name, out of: {', '.join(others)}"
        )
    return "features", (label,)


def _is_prose(values: list[Any]) -> bool:
    """Whether these are strings, and not the numbers of a CSV."""
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
            raise UsageError(f"{table.place} has no column {name!r}, which the other split has")
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
            what = "nothing" if value is None else type(value).__name__
            raise UsageError(f"row {row + 1} of {table.place} has {what} in column {name!r}, which must hold texts")
    return table.columns[name]


def _stored_image(value: Any, folder: Path) -> Any:
    """As `datasets.Image(decode=False)` gives it; a path is one beside the table."""
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
        raise UsageError(f"{table.place} has {len(rows)} rows of features and {len(table.columns[label])} labels")
    return [np.asarray(row) for row in rows.with_format("numpy")["features"]]


def _labels(table: _Table, name: str) -> np.ndarray:
    """Classes as strings, so that 1 of JSON and 1 of CSV are the same."""
    found = []
    for row, value in enumerate(table.columns[name]):
        if value is None or value == "":
            raise UsageError(f"row {row + 1} of {table.place} has no label in column {name!r}; leave the row out")
        if isinstance(value, float) and not value.is_integer():
            raise UsageError(
                f"row {row + 1} of {table.place} has the number {value} in column {name!r}, where a class belongs; "
                "name a column of classes by --label_column_name"
            )
        if not isinstance(value, (str, int, float)):
            raise UsageError(f"row {row + 1} of {table.place} has {type(value).__name__} in column {name!r}, no class")
        found.append(str(int(value)) if isinstance(value, float) else str(value))
    return np.array(found)


def _scores(table: _Table, name: str) -> np.ndarray:
    found = np.empty(len(table))
    for row, value in enumerate(table.columns[name]):
        try:
            found[row] = float(value)
        except (TypeError, ValueError):
            found[row] = np.nan
        if not np.isfinite(found[row]):
            raise UsageError(f"row {row + 1} of {table.place} has {value!r:.40} in column {name!r}, not a number")
    return found


# ---- splits


def _with_train(task: Task, parts: dict[str, Split], seed: int) -> Task:
    """The task with something to fit probes on; what is tested on is in no other part."""
    if len(parts) == 1:
        (whole,) = parts.values()
        classes, counts = np.unique(whole.targets, return_counts=True)
        if len(classes) > 1 and counts.min() < 2:
            raise UsageError(
                f"task {task.source!r} has the class {str(classes[counts.argmin()])!r} in a single row, of which none "
                "can be held out; leave it out, or give a folder with files train.* and test.*"
            )
        size = max(round(HELD_OUT * len(whole)), len(classes))
        if len(whole) - size < len(classes):
            raise UsageError(f"task {task.source!r} has too few rows ({len(whole)}) to hold some out; give more")
        chosen, held_out = train_test_split(
            np.arange(len(whole)), test_size=size, stratify=whole.targets, random_state=seed
        )
        return replace(task, train=whole.rows(np.sort(chosen)), test=whole.rows(np.sort(held_out)))
    if "test" not in parts:
        return replace(task, train=parts["train"], test=parts["validation"])
    if "train" not in parts:
        return replace(task, train=parts["validation"], test=parts["test"])
    return replace(task, train=parts["train"], validation=parts.get("validation"), test=parts["test"])


def _checked(task: Task) -> Task:
    classes = set(task.train.targets)
    if len(classes) < 2:
        raise UsageError(
            f"task {task.source!r} has one class only, {str(next(iter(classes)))!r}, to learn; give rows of two or more"
        )
    for name, split in (("test", task.test), ("validation", task.validation)):
        unknown = sorted(set(split.targets) - classes) if split is not None else []
        if unknown:
            raise UsageError(
                f"task {task.source!r} has the class {str(unknown[0])!r} in its {name} rows and not in those it is "
                "learnt from; give both the same classes"
            )
    return task


def _limited(task: Task, args: TaskArguments) -> Task:
    train = None if task.train is None else _drawn(task.train, args.max_train_samples, args.seed)
    limited = replace(task, train=train, test=_drawn(task.test, args.max_test_samples, args.seed))
    return limited if train is None else _checked(limited)


def _drawn(split: Split, size: int | None, seed: int) -> Split:
    if size is None or size >= len(split):
        return split
    stratify = None
    if split.targets is not None and split.targets.dtype.kind == "U":
        counts = np.unique(split.targets, return_counts=True)[1]
        if counts.min() > 1 and len(counts) <= min(size, len(split) - size):
            stratify = split.targets
    chosen, _ = train_test_split(np.arange(len(split)), train_size=size, stratify=stratify, random_state=seed)
    return split.rows(np.sort(chosen))
