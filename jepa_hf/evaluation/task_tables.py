"""Tables of tasks, read from files, folders and datasets on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image

from ..data.arguments import DataArguments
from ..data.feature_arrays import flat_arrays
from ..data.feature_readers import array_format, is_array_file
from ..data.file_readers import file_errors_as_usage_error, file_format, read_rows
from ..data.image_files import list_images
from ..data.splits import load_hub_dataset
from ..errors import UsageError
from .task import TaskArguments

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Table:
    """Columns of one length, their location for error messages, and arguments to read features."""

    place: str
    columns: dict[str, list[Any]]
    folder: Path
    arguments: DataArguments

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read_tables(source: str, args: TaskArguments) -> dict[str, Table]:
    """Read the available splits, in the order train, validation, test.

    Raises:
        UsageError: a source does not exist or cannot be read, or a table has no rows.
    """
    tables = _tables(source, args)
    for table in tables.values():
        if not len(table):
            raise UsageError(f"{table.place} has no rows. Give data with at least one row.")
    return tables


def _tables(source: str, args: TaskArguments) -> dict[str, Table]:
    path = Path(source)
    if path.is_file():
        return {"test": _read_file(path, args)}
    if path.is_dir():
        files = {split: _find(path, names) for split, names in SPLIT_NAMES.items()}
        tables = {split: _read_file(file, args) for split, file in files.items() if file is not None}
        return tables or _image_tables(path, args)
    if path.suffix or path.is_absolute():
        raise UsageError(f"Task {source!r} does not exist. Check the path.")
    try:
        splits = load_hub_dataset(DataArguments(dataset_name=source))
    except UsageError as error:
        raise UsageError(
            f"Task {source!r} is neither a file nor a folder, and no dataset was loaded: {error}"
        ) from None
    present = {split: [name for name in names if name in splits] for split, names in SPLIT_NAMES.items()}
    if not any(present.values()):
        raise UsageError(f"Task {source!r} has no split train or test. Its splits are: {', '.join(splits)}.")
    return {split: _from_dataset(splits[names[0]], source, names[0], args) for split, names in present.items() if names}


def _image_tables(folder: Path, args: TaskArguments) -> dict[str, Table]:
    """List the images of a folder, or of its folders train and test, whose labels are the folders that they are in."""
    folders = {
        split: part for split, names in SPLIT_NAMES.items() for part in map(folder.joinpath, names) if part.is_dir()
    }
    tables = {}
    for split, part in (folders or {"test": folder}).items():
        images = list_images(str(part))
        if not images:
            raise UsageError(
                f"Task '{folder}' is a folder without a file test.* or train.*, and without images in folders of their "
                "classes. Name a file in it."
            )
        labels = [Path(image).parent.name for image in images]
        tables[split] = Table(f"'{part}'", {"image": images, "label": labels}, Path(), _feature_arguments(args))
    return tables


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the file of a split, None if the folder has none."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.split(".")[0] in names)
    if len(files) > 1:
        raise UsageError(f"Folder {str(folder)!r} has {files[0].name} and {files[1].name}. Remove one of them.")
    return files[0] if files else None


def _read_file(path: Path, args: TaskArguments) -> Table:
    place, arguments = f"'{path}'", _feature_arguments(args, train_file=str(path))
    if path.stat().st_size == 0:
        raise UsageError(f"{place} is empty. Give a file with rows.")
    if is_array_file(str(path)):
        return Table(place, _array_columns(path), path.parent, arguments)
    kind = file_format(str(path))
    with file_errors_as_usage_error(str(path)):
        rows = [row for row in read_rows(str(path), kind) if row]
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(place, {name: [row.get(name) for row in rows] for name in names}, path.parent, arguments)


def _array_columns(path: Path) -> dict[str, list[Any]]:
    if array_format(str(path)) == "npy":
        raise UsageError(f"'{path}' has no labels. Save an .npz file with the arrays features and label.")
    return {name: array.tolist() for name, array in flat_arrays(str(path)).items()}


def _from_dataset(dataset: Dataset, source: str, split: str, args: TaskArguments) -> Table:
    place = f"Split '{split}' of {source!r}"
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    columns = dataset.to_dict()
    for name, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            columns[name] = [value if value is None or value < 0 else feature.int2str(value) for value in columns[name]]
    arguments = _feature_arguments(args, dataset_name=source, dataset_train_split=split)
    return Table(place, columns, Path(), arguments)


def _feature_arguments(args: TaskArguments, **source: str) -> DataArguments:
    arguments = DataArguments(**source)  # type: ignore[arg-type]  # fields that hold strings
    return replace(arguments, label_column_name=args.label_column_name, feature_column_names=args.feature_column_names)
