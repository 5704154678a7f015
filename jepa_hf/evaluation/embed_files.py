"""Embedding of data files in parts, so that memory is bounded and a killed run can resume."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.arguments import DataArguments
from ..data.feature_datasets import load_feature_datasets
from ..data.file_readers import (
    file_errors_as_usage_error,
    file_format,
    find_files,
    open_parquet,
    read_rows,
    replace_lone_surrogates,
)
from ..data.image_datasets import load_image_datasets
from ..data.text_datasets import text_column
from ..errors import UsageError
from ..utils.atomic_files import atomic_write
from .embedder import Embedder

OUTPUT_SUFFIXES = (".parquet", ".npy")
EMBEDDING_COLUMN = "embedding"

# Rows per part, which are in memory together. Texts are batched by length within a part.
_ROWS_PER_PART = {"text": 2048, "features": 2048, "images": 256}
_SETTINGS_FILE = "settings.json"

# Columns to keep, and the samples to embed.
Part = tuple[pa.Table, Sequence[Any]]


@dataclass(frozen=True)
class RowSource:
    """Rows to embed, which are read on demand.

    Args:
        count: number of rows.
        parts: returns an iterator over the rows in parts, always the same ones.
        description: files and columns that identify the source, in JSON types.
    """

    count: int
    parts: Callable[[], Iterator[Part]]
    description: dict[str, Any]


def open_source(modality: str, args: DataArguments) -> RowSource:
    """Open the rows of `args.train_file`: texts, images or feature vectors.

    For texts all columns are kept, for images their path, for features the row number, counted from
    0. Blank and null texts are embedded as the empty text, so that no row is dropped. All rows of
    text files are checked here.

    Args:
        modality: "text", "images" or "features".
        args: names of files and columns.

    Returns:
        The rows as a source for `embed_files`.

    Raises:
        UsageError: files, columns or rows are missing, or values have the wrong type.
    """
    size = _ROWS_PER_PART[modality]
    files = args.train_file or ""
    if modality == "text":
        return _text_source(files, args.text_column_name, size)
    load = load_image_datasets if modality == "images" else load_feature_datasets
    make_part = _image_part if modality == "images" else _feature_part
    try:
        dataset, _ = load(args, seed=0, need_validation=False)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("train_file ")) from None

    def parts() -> Iterator[Part]:
        for begin in range(0, len(dataset), size):
            yield make_part(dataset, range(begin, min(begin + size, len(dataset))))

    columns = [args.image_column_name, args.feature_column_names, args.label_column_name]
    return RowSource(len(dataset), parts, {"files": _file_fingerprints(_expand_paths(files)), "columns": columns})


def _image_part(dataset: Dataset, rows: range) -> Part:
    images = [dataset[row]["image"] for row in rows]
    return pa.table({"path": pa.array([image["path"] for image in images], pa.string())}), images


def _feature_part(dataset: Dataset, rows: range) -> Part:
    values = dataset.with_format("numpy")[rows.start : rows.stop]["features"]
    return pa.table({"row": pa.array(rows, pa.int64())}), values


# ---- texts


def _text_source(files: str, column_name: str | None, size: int) -> RowSource:
    paths = find_files("FILES", files)
    kinds = sorted({file_format(path) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"Expected files of one kind, got {' and '.join(kinds)} files.")
    (kind,) = kinds
    columns = {path: text_column(path, kind, column_name) for path in paths if os.stat(path).st_size}
    if not columns:
        raise UsageError(f"'{paths[0]}' is empty. Give a file with rows.")
    column = next(iter(columns.values()))
    if other := next((path for path, name in columns.items() if name != column), None):
        raise UsageError(
            f"The text is in column '{column}' of '{paths[0]}', but in '{columns[other]}' of '{other}'. Name one by "
            "--text_column_name, or give files with the same columns."
        )
    if kind == "parquet":
        count, names, tables = _open_parquet_files(list(columns), size)
    else:
        count, names, tables = _open_rows(list(columns), kind, column, size)
    if count == 0:
        raise UsageError(f"'{paths[0]}' has no rows. Give a file with rows.")
    if EMBEDDING_COLUMN in names:
        raise UsageError(f"'{paths[0]}' has a column '{EMBEDDING_COLUMN}' already. Rename it.")

    def parts() -> Iterator[Part]:
        for table in tables():
            yield table, [text or "" for text in table[column].to_pylist()]

    return RowSource(count, parts, {"files": _file_fingerprints(list(columns)), "columns": [column]})


# Number of rows, names of columns, and a function that reads the rows in parts.
OpenedTables = tuple[int, list[str], Callable[[], Iterator[pa.Table]]]


def _open_parquet_files(paths: list[str], size: int) -> OpenedTables:
    """Open Parquet files with equal columns, whose types are kept."""
    count = 0
    schemas: list[pa.Schema] = []
    for path in paths:
        with file_errors_as_usage_error(path), open_parquet(path) as parquet:
            count += parquet.metadata.num_rows
            schemas.append(parquet.schema_arrow.remove_metadata())
    if any(schema != schemas[0] for schema in schemas):
        raise UsageError(f"'{paths[0]}' and the other files differ in their columns. Give files with the same ones.")

    def tables() -> Iterator[pa.Table]:
        for path in paths:
            with file_errors_as_usage_error(path), open_parquet(path) as parquet:
                for batch in parquet.iter_batches(size):
                    yield pa.Table.from_batches([batch]).cast(schemas[0])

    return count, schemas[0].names, tables


def _open_rows(paths: list[str], kind: str, column: str, size: int) -> OpenedTables:
    """Open other files. They are read once to check the texts and to infer the columns' types."""
    kinds: dict[str, set[str]] = {}
    count = 0
    for path in paths:
        for number, row in enumerate(_rows([path], kind), 1):
            count += 1
            if not isinstance(row.get(column), str | None):
                raise UsageError(
                    f"Expected a string in column '{column}', got {type(row[column]).__name__} in row {number} of "
                    f"'{path}'."
                )
            for name, value in row.items():
                kinds.setdefault(name, set()).add(_type_name(value))
    types = {name: _arrow_type(names) for name, names in kinds.items()}

    def tables() -> Iterator[pa.Table]:
        rows = _rows(paths, kind)
        while chunk := list(islice(rows, size)):
            yield pa.table(
                {
                    replace_lone_surrogates(name): pa.array(
                        [_coerce(row.get(name), arrow_type) for row in chunk], arrow_type
                    )
                    for name, arrow_type in types.items()
                }
            )

    return count, list(types), tables


def _rows(paths: list[str], kind: str) -> Iterator[dict[str, Any]]:
    for path in paths:
        with file_errors_as_usage_error(path):
            yield from read_rows(path, kind)


def _type_name(value: Any) -> str:
    """Return the name of a type that a column can have, else "other" (also beyond 64 bits)."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "other"
    return type(value).__name__ if isinstance(value, str | bool | int | float | None) else "other"


def _arrow_type(kinds: set[str]) -> pa.DataType:
    """Return the type of a column with these kinds of values; mixed values become JSON strings."""
    match sorted(kinds - {"NoneType"}):
        case ["bool"]:
            return pa.bool_()
        case ["int"]:
            return pa.int64()
        case ["float"] | ["float", "int"]:
            return pa.float64()
        case _:
            return pa.string()


def _coerce(value: Any, kind: pa.DataType) -> Any:
    if value is None or not pa.types.is_string(kind):
        return value
    return replace_lone_surrogates(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# ---- from parts to one file


def embed_files(
    embedder: Embedder,
    source: RowSource,
    output: str | Path,
    pooling: str = "mean",
    settings: dict[str, Any] | None = None,
    show_progress: bool = False,
) -> int:
    """Write the embeddings of all rows, float32.

    Finished parts stay in `OUTPUT.parts/` until the last one is written, so the same call resumes
    after them.

    Args:
        embedder: the encoder.
        source: rows from `open_source`.
        output: a new file; `.parquet` for the source's columns and a column of lists, `embedding`;
            `.npy` for an array `[rows, D]`.
        pooling: see `Embedder`.
        settings: further settings that must be equal to resume, in JSON types; such as the model's
            name.
        show_progress: whether to show a progress bar.

    Returns:
        Width D of the embeddings.

    Raises:
        UsageError: `output` exists or cannot be written, `OUTPUT.parts/` belongs to another
            embedding, or the encoder cannot read a row.
    """
    output = Path(output)
    check_output(output)
    fingerprint = json.loads(json.dumps({"pooling": pooling, **source.description, **(settings or {})}, default=str))
    folder = Path(f"{output}.parts")
    _check_or_write_settings(folder, fingerprint)
    paths: list[Path] = []
    first = 0
    with tqdm(total=source.count, desc=embedder.name, unit=" rows", disable=not show_progress) as bar:
        for table, samples in source.parts():
            path = folder / f"part-{len(paths):06d}{output.suffix}"
            if _num_rows_if_complete(path) != len(samples):
                try:
                    vectors = embedder.embed(samples, (pooling,))[pooling]
                except UsageError as error:
                    raise UsageError(f"In the rows from {first + 1} on: {error}") from None
                _write_part(path, table, vectors)
            paths.append(path)
            first += len(samples)
            bar.update(len(samples))
    width = _join(paths, output, first)
    shutil.rmtree(folder)
    return width


def check_output(output: Path) -> None:
    """Check that a file can be created.

    Raises:
        UsageError: the file exists, has an unknown ending, or its folder is missing or not
            writable.
    """
    if output.suffix not in OUTPUT_SUFFIXES:
        raise UsageError(f"Expected output to end in {' or '.join(OUTPUT_SUFFIXES)}, got {str(output)!r}.")
    if output.exists():
        raise UsageError(f"Output {str(output)!r} exists. Delete it, or name another.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UsageError(f"The folder of output {str(output)!r} does not exist or is not writable. Name another.")


def _check_or_write_settings(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write the settings to the folder of parts, or check that its parts have the same ones."""
    path = folder / _SETTINGS_FILE
    if path.is_file():
        previous = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in fingerprint if fingerprint[name] != previous.get(name)]
        if changed:
            raise UsageError(
                f"{str(folder)!r} holds parts of another embedding (with other {', '.join(changed)}). Repeat that "
                "command, delete the folder, or name another output."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"The folder for parts, {str(folder)!r}, holds other files. Name another output.")
    folder.mkdir(exist_ok=True)
    with atomic_write(path) as new:
        new.write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")


def _write_part(path: Path, table: pa.Table, vectors: np.ndarray) -> None:
    with atomic_write(path) as new:
        if path.suffix == ".npy":
            np.save(new, vectors)
            return
        offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
        lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
        pq.write_table(table.append_column(EMBEDDING_COLUMN, lists), new)


def _num_rows_if_complete(path: Path) -> int | None:
    """Return the number of rows of a part; None if the file is missing or truncated."""
    try:
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r"))
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError, pa.ArrowException):
        return None


def _join(paths: list[Path], output: Path, count: int) -> int:
    """Write all parts to one file, atomically; return the width of the embeddings."""
    with atomic_write(output) as new:
        if output.suffix == ".npy":
            width = np.load(paths[0], mmap_mode="r").shape[1]
            _join_arrays(paths, new, (count, width))
            return width
        _join_tables(paths, new)
    return len(pq.ParquetFile(paths[0]).read_row_group(0, [EMBEDDING_COLUMN])[EMBEDDING_COLUMN][0])


def _join_arrays(paths: list[Path], new: Path, shape: tuple[int, int]) -> None:
    joined = np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=shape)
    begin = 0
    for path in paths:
        part = np.load(path)
        joined[begin : begin + len(part)] = part
        begin += len(part)
    joined.flush()


def _join_tables(paths: list[Path], new: Path) -> None:
    with pq.ParquetWriter(new, pq.read_schema(paths[0])) as writer:
        for path in paths:
            writer.write_table(pq.read_table(path))


def _expand_paths(files: str) -> list[str]:
    """Return the named files and folders, and the folders' contents."""
    names = [files] if os.path.exists(files) else list(map(str.strip, files.split(",")))
    folders = (map(str, Path(name).rglob("*")) if os.path.isdir(name) else [name] for name in names)
    return sorted(chain.from_iterable(folders))


def _file_fingerprints(paths: list[str]) -> list[list[Any]]:
    """Return name, size and modification time of each file; parts are obsolete if any changes."""
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths if os.path.isfile(path)]
