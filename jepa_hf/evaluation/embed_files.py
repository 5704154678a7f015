"""From files to a file of embeddings: in parts, so that memory is bounded and a killed run goes on where it was."""

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
from ..data.file_readers import file_kind, find_files, naming_file, open_parquet, read_rows, well_formed
from ..data.image_datasets import load_image_datasets
from ..data.text_datasets import text_column
from ..errors import UsageError
from ..utils.atomic_files import whole_file
from .embedder import Embedder

ENDINGS = (".parquet", ".npy")
EMBEDDING_COLUMN = "embedding"

# Rows that are in memory together; texts are sorted by length among so many.
_ROWS_PER_PART = {"text": 2048, "features": 2048, "images": 256}
_SETTINGS_FILE = "settings.json"

# Columns that are kept, and what is to be embedded.
Part = tuple[pa.Table, Sequence[Any]]


@dataclass(frozen=True)
class Source:
    """Rows to embed, read whenever they are asked for.

    Args:
        count: number of rows.
        parts: gives them part by part, the same parts each time.
        description: what tells this source from another, as JSON knows it.
    """

    count: int
    parts: Callable[[], Iterator[Part]]
    description: dict[str, Any]


def open_source(modality: str, args: DataArguments) -> Source:
    """The rows of `args.train_file`: texts, images or feature vectors.

    Of texts all columns are kept, of images their path, of features the number of the row, counted from 0. A text that
    is blank or null is embedded as the empty text, so that no row is lost. Every row of a text file is checked here.

    Args:
        modality: "text", "images" or "features".
        args: names of files and columns.

    Raises:
        UsageError: files or columns that are not there or hold something else, or no rows.
    """
    size = _ROWS_PER_PART[modality]
    if modality == "text":
        return _text_source(args, size)
    load = load_image_datasets if modality == "images" else load_feature_datasets
    cut = _image_part if modality == "images" else _feature_part
    try:
        dataset, _ = load(args, seed=0, need_validation=False)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("train_file ")) from None

    def parts() -> Iterator[Part]:
        for begin in range(0, len(dataset), size):
            yield cut(dataset, range(begin, min(begin + size, len(dataset))))

    columns = [args.image_column_name, args.feature_column_names, args.label_column_name]
    return Source(len(dataset), parts, {"files": _stamps(_listed(args.train_file)), "columns": columns})


def _image_part(dataset: Dataset, rows: range) -> Part:
    images = [dataset[row]["image"] for row in rows]
    return pa.table({"path": pa.array([image["path"] for image in images], pa.string())}), images


def _feature_part(dataset: Dataset, rows: range) -> Part:
    values = dataset.with_format("numpy")[rows.start : rows.stop]["features"]
    return pa.table({"row": pa.array(rows, pa.int64())}), values


# ---- texts


def _text_source(args: DataArguments, size: int) -> Source:
    paths = find_files("FILES", args.train_file)
    kinds = sorted({file_kind(path) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"the files are {' and '.join(kinds)} files; give files of one kind")
    (kind,) = kinds
    columns = {path: text_column(path, kind, args.text_column_name) for path in paths if os.stat(path).st_size}
    if not columns:
        raise UsageError(f"'{paths[0]}' is empty; give a file with rows")
    column = next(iter(columns.values()))
    if odd := next((path for path, name in columns.items() if name != column), None):
        raise UsageError(
            f"the text is in column '{column}' of '{paths[0]}' and in '{columns[odd]}' of '{odd}'; name one by "
            "--text_column_name, or give files of one kind"
        )
    if kind == "parquet":
        count, names, tables = _open_parquet_files(list(columns), size)
    else:
        count, names, tables = _open_rows(list(columns), kind, column, size)
    if count == 0:
        raise UsageError(f"'{paths[0]}' has no rows; give a file with rows")
    if EMBEDDING_COLUMN in names:
        raise UsageError(f"'{paths[0]}' has a column '{EMBEDDING_COLUMN}' already; rename it")

    def parts() -> Iterator[Part]:
        for table in tables():
            yield table, [text or "" for text in table[column].to_pylist()]

    return Source(count, parts, {"files": _stamps(list(columns)), "columns": [column]})


# Number of rows, names of columns, and what reads the rows in parts.
Opened = tuple[int, list[str], Callable[[], Iterator[pa.Table]]]


def _open_parquet_files(paths: list[str], size: int) -> Opened:
    """Parquet files of the same columns, whose types stay."""
    count, schemas = 0, []
    for path in paths:
        with naming_file(path), open_parquet(path) as parquet:
            count += parquet.metadata.num_rows
            schemas.append(parquet.schema_arrow.remove_metadata())
    if any(schema != schemas[0] for schema in schemas):
        raise UsageError(f"'{paths[0]}' and the other files differ in their columns; give files of one kind")

    def tables() -> Iterator[pa.Table]:
        for path in paths:
            with naming_file(path), open_parquet(path) as parquet:
                for batch in parquet.iter_batches(size):
                    yield pa.Table.from_batches([batch]).cast(schemas[0])

    return count, schemas[0].names, tables


def _open_rows(paths: list[str], kind: str, column: str, size: int) -> Opened:
    """Other files, read once: a column's type is that of all its values, and texts must be strings or null."""
    kinds: dict[str, set[str]] = {}
    count = 0
    for path in paths:
        for number, row in enumerate(_rows([path], kind), 1):
            count += 1
            if not isinstance(row.get(column), str | None):
                raise UsageError(
                    f"row {number} of '{path}' has {type(row[column]).__name__} in column '{column}', which must hold "
                    "strings"
                )
            for name, value in row.items():
                kinds.setdefault(name, set()).add(_kind_of(value))
    types = {name: _arrow_type(found) for name, found in kinds.items()}

    def tables() -> Iterator[pa.Table]:
        rows = _rows(paths, kind)
        while chunk := list(islice(rows, size)):
            yield pa.table(
                {
                    well_formed(name): pa.array([_as_type(row.get(name), arrow_type) for row in chunk], arrow_type)
                    for name, arrow_type in types.items()
                }
            )

    return count, list(types), tables


def _rows(paths: list[str], kind: str) -> Iterator[dict[str, Any]]:
    for path in paths:
        with naming_file(path):
            yield from read_rows(path, kind)


def _kind_of(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "other"
    return type(value).__name__ if isinstance(value, str | bool | int | float | None) else "other"


def _arrow_type(kinds: set[str]) -> pa.DataType:
    """The type of a column with values of these kinds; what is neither text nor number becomes JSON."""
    match sorted(kinds - {"NoneType"}):
        case ["bool"]:
            return pa.bool_()
        case ["int"]:
            return pa.int64()
        case ["float"] | ["float", "int"]:
            return pa.float64()
        case _:
            return pa.string()


def _as_type(value: Any, kind: pa.DataType) -> Any:
    if value is None or not pa.types.is_string(kind):
        return value
    return well_formed(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# ---- from parts to one file


def embed_files(
    embedder: Embedder,
    source: Source,
    output: str | Path,
    pooling: str = "mean",
    settings: dict[str, Any] | None = None,
    show_progress: bool = False,
) -> int:
    """Write the embeddings of all rows, float32.

    Finished parts lie in `OUTPUT.parts/` until all are there; the same call goes on after them.

    Args:
        output: a new file; `.parquet` for the source's columns and a column of lists, `embedding`; `.npy` for an
            array `[rows, D]`.
        pooling: see `Embedder`.
        settings: what else must be the same for parts to fit together, as JSON knows it.

    Returns:
        Width D of the embeddings.

    Raises:
        UsageError: `output` exists or cannot be written, `OUTPUT.parts/` is of another embedding, or a row that the
            encoder cannot read.
    """
    output = Path(output)
    check_output(output)
    described = json.loads(json.dumps({"pooling": pooling, **source.description, **(settings or {})}, default=str))
    folder = Path(f"{output}.parts")
    _claim(folder, described)
    paths, first = [], 0
    with tqdm(total=source.count, desc=embedder.name, unit=" rows", disable=not show_progress) as bar:
        for table, samples in source.parts():
            path = folder / f"part-{len(paths):06d}{output.suffix}"
            if _rows_of(path) != len(samples):
                try:
                    vectors = embedder.embed(samples, (pooling,))[pooling]
                except UsageError as error:
                    raise UsageError(f"among the rows from {first + 1} on, {error}") from None
                _write_part(path, table, vectors)
            paths.append(path)
            first += len(samples)
            bar.update(len(samples))
    width = _join(paths, output, first)
    shutil.rmtree(folder)
    return width


def check_output(output: Path) -> None:
    """Refuse a file that exists, has an unknown ending or lies where nothing can be written."""
    if output.suffix not in ENDINGS:
        raise UsageError(f"output {str(output)!r} does not end in {' or '.join(ENDINGS)}; name such a file")
    if output.exists():
        raise UsageError(f"output {str(output)!r} exists; delete it, or name another")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UsageError(f"output {str(output)!r} lies in no folder that can be written to; name another place")


def _claim(folder: Path, described: dict[str, Any]) -> None:
    """Note whose parts a folder holds, or make sure that they are this call's."""
    path = folder / _SETTINGS_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in described if described[name] != before.get(name)]
        if changed:
            raise UsageError(
                f"{str(folder)!r} holds the beginning of another embedding (with other {', '.join(changed)}); repeat "
                "that command, delete the folder, or name another output"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{str(folder)!r}, where parts are to be kept, holds something else; name another output")
    folder.mkdir(exist_ok=True)
    with whole_file(path) as new:
        new.write_text(json.dumps(described, indent=1), encoding="utf-8")


def _write_part(path: Path, table: pa.Table, vectors: np.ndarray) -> None:
    with whole_file(path) as new:
        if path.suffix == ".npy":
            np.save(new, vectors)
            return
        ends = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
        lists = pa.ListArray.from_arrays(ends, pa.array(vectors.reshape(-1)))
        pq.write_table(table.append_column(EMBEDDING_COLUMN, lists), new)


def _rows_of(path: Path) -> int | None:
    """Number of rows of a part; None where it is not there, or not whole."""
    try:
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r"))
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError, pa.ArrowException):
        return None


def _join(paths: list[Path], output: Path, count: int) -> int:
    """One file of all parts, written whole; the width of the embeddings."""
    with whole_file(output) as new:
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


def _listed(files: str) -> list[str]:
    """Files and folders that are there, as they were named, and what lies in folders."""
    names = [files] if os.path.exists(files) else list(map(str.strip, files.split(",")))
    folders = (map(str, Path(name).rglob("*")) if os.path.isdir(name) else [name] for name in names)
    return sorted(chain.from_iterable(folders))


def _stamps(paths: list[str]) -> list[list[Any]]:
    """Name, size and time of change of each file: another one makes other parts."""
    return [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths if os.path.isfile(path)]
