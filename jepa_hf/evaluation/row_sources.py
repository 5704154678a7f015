"""Sources of rows for `embed_files`: samples, and the other columns of their rows."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.arguments import DataArguments
from ..data.feature_arrays import flat_arrays
from ..data.feature_datasets import feature_column_names, load_feature_datasets
from ..data.feature_readers import ARRAY_FORMATS, array_format
from ..data.file_readers import file_format, find_files, single_kind
from ..data.image_datasets import list_image_files, load_image_datasets, parquet_image_column
from ..data.text_datasets import text_column
from ..errors import UsageError
from ..utils.counts import counted
from .table_readers import Tables, open_tables

# Rows per part, which are in memory together. Texts are batched by length within a part.
_ROWS_PER_PART = {"text": 2048, "features": 2048, "images": 256}

# Columns to keep, and the samples to embed.
Part = tuple[pa.Table, Sequence[Any]]


@dataclass(frozen=True)
class RowSource:
    """Rows to embed, which are read on demand.

    Args:
        count: number of rows.
        parts: returns an iterator over the rows in parts, always the same ones.
        description: files and columns that identify the source, in JSON types.
        feature_column_names: names of the features in the samples, if they have names.
    """

    count: int
    parts: Callable[[], Iterator[Part]]
    description: dict[str, Any]
    feature_column_names: list[str] | None = None


def open_source(
    modality: str,
    args: DataArguments,
    column_names: Sequence[str] | None = None,
    max_samples: int | None = None,
) -> RowSource:
    """Open the rows of `args.train_file`: texts, images or feature vectors.

    All columns of the rows are kept, except the images and the features. Images get their `path`, and image files in
    several folders the folder's name as `label`. Features get their `row` number, counted from 0. Blank and null texts
    are embedded as the empty text, so that no row is dropped. All rows of text files are checked here.

    Args:
        modality: "text", "images" or "features".
        args: names of files and columns.
        column_names: columns of features that the encoder reads, see `load_feature_datasets`.
        max_samples: number of rows from the start. Default: all.

    Returns:
        The rows as a source for `embed_files`.

    Raises:
        UsageError: files, columns or rows are missing, or values have the wrong type.
    """
    size = _ROWS_PER_PART[modality]
    try:
        match modality:
            case "text":
                source = _text_source(args.train_file or "", args.text_column_name, size)
            case "images":
                source = _image_source(args, size)
            case _:
                source = _feature_source(args, column_names, size)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("train_file ")) from None
    return source if max_samples is None or max_samples >= source.count else _limited(source, max_samples)


def _limited(source: RowSource, count: int) -> RowSource:
    def parts() -> Iterator[Part]:
        remaining = count
        for table, samples in source.parts():
            yield table.slice(0, remaining), samples[:remaining]
            remaining -= len(samples)
            if remaining <= 0:
                return

    return replace(source, count=count, parts=parts, description=source.description | {"max_samples": count})


def _text_source(files: str, column_name: str | None, size: int) -> RowSource:
    paths = find_files("FILES", files)
    kind = single_kind("FILES", files, map(file_format, paths))
    columns = {path: text_column(path, kind, column_name) for path in paths if os.stat(path).st_size}
    if not columns:
        raise UsageError(f"'{paths[0]}' is empty. Give a file with rows.")
    column = next(iter(columns.values()))
    if other := next((path for path, name in columns.items() if name != column), None):
        raise UsageError(
            f"The text is in column '{column}' of '{paths[0]}', but in '{columns[other]}' of '{other}'. Name one by "
            "--text_column_name, or give files with the same columns."
        )
    tables = open_tables(list(columns), kind, size, text_column=column)
    if tables.count == 0:
        raise UsageError(f"'{paths[0]}' has no rows. Give a file with rows.")

    def parts() -> Iterator[Part]:
        for table, _ in tables.read():
            yield table, [text or "" for text in table[column].to_pylist()]

    return RowSource(tables.count, parts, {"files": _file_fingerprints(list(columns)), "columns": [column]})


def _image_source(args: DataArguments, size: int) -> RowSource:
    dataset, _ = load_image_datasets(args, seed=0, need_validation=False)
    paths = list_image_files("train_file", args.train_file or "")
    column = parquet_image_column("train_file", args)
    if column is None:
        folders = [Path(image["path"]).parent.name for image in dataset["image"]]
        kept = _in_memory({"label": folders} if len(set(folders)) > 1 else {}, len(dataset), size)
    else:
        kept = open_tables(paths, "parquet", size, exclude=[column])

    def part(table: pa.Table, rows: range) -> Part:
        images = [dataset[row]["image"] for row in rows]
        paths = pa.array([image["path"] for image in images], pa.string())
        return _with_first_column(table, "path", paths), images

    return _aligned_source(dataset, kept, part, args, paths)


def _feature_source(args: DataArguments, column_names: Sequence[str] | None, size: int) -> RowSource:
    dataset, _ = load_feature_datasets(args, seed=0, need_validation=False, column_names=column_names)
    names = feature_column_names(dataset)
    paths = find_files("train_file", args.train_file or "")
    kind = array_format(paths[0])
    if kind in ARRAY_FORMATS.values():
        kept = _in_memory(_array_columns(paths, len(dataset)) if kind == "npz" else {}, len(dataset), size)
    else:
        kept = open_tables(paths, kind, size, exclude=names or [])

    def part(table: pa.Table, rows: range) -> Part:
        samples = list(dataset.with_format("numpy")[rows.start : rows.stop]["features"])
        return _with_first_column(table, "row", pa.array(rows, pa.int64())), samples

    return replace(_aligned_source(dataset, kept, part, args, paths), feature_column_names=names)


def _array_columns(paths: Sequence[str], count: int) -> dict[str, Any]:
    """Return the arrays of npz files with one entry per row, such as labels."""
    files = [flat_arrays(path) for path in paths]
    shared = [name for name in files[0] if all(name in arrays for arrays in files)]
    columns = {name: np.concatenate([arrays[name] for arrays in files]) for name in shared}
    return {name: column for name, column in columns.items() if len(column) == count}


def _in_memory(columns: dict[str, Any], count: int, size: int) -> Tables:
    def read() -> Iterator[tuple[pa.Table, int]]:
        for begin in range(0, count, size):
            end = min(begin + size, count)
            yield pa.table({name: values[begin:end] for name, values in columns.items()}), end - begin

    return Tables(count, read)


def _aligned_source(
    dataset: Dataset, kept: Tables, part: Callable[[pa.Table, range], Part], args: DataArguments, paths: list[str]
) -> RowSource:
    """Join the samples of a dataset with the columns that are kept of its rows."""
    if kept.count != len(dataset):
        raise UsageError(
            f"'{args.train_file}' has {counted(len(dataset), 'sample')} in {counted(kept.count, 'row')}. Remove rows "
            "without one."
        )

    def parts() -> Iterator[Part]:
        first = 0
        for table, length in kept.read():
            yield part(table, range(first, first + length))
            first += length

    columns = [args.image_column_name, args.feature_column_names, args.label_column_name]
    return RowSource(len(dataset), parts, {"files": _file_fingerprints(paths), "columns": columns})


def _with_first_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    others = {column: table[column] for column in table.column_names}
    return pa.table({name: values} | others)


def _file_fingerprints(paths: list[str]) -> list[list[Any]]:
    """Return name, size and modification time of each file; parts are obsolete if any changes."""
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]
