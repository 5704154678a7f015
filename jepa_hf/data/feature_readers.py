"""Readers of feature files: arrays, tables and lists, as blocks of float32 numbers."""

import csv
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from datasets import Array2D

from ..errors import UsageError
from .arguments import DataArguments
from .file_readers import is_gzip, open_bytes, open_parquet, open_text, read_rows

logger = logging.getLogger(__name__)

# What numpy and zipfile raise on damaged files: the header of an array is a line of Python that tells its size.
ARRAY_ERRORS = (
    ValueError, EOFError, SyntaxError, TokenError, TypeError, MemoryError, OverflowError, RuntimeError, struct.error,
    zlib.error, BadZipFile,
)  # fmt: skip
_KINDS = {
    ".npy": "npy",
    ".npz": "npz",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
}
_DELIMITERS = {"csv": ",", "tsv": "\t"}
BATCH_ROWS = 1000
BLOCK_SIZE = 2**24  # numbers of an array, or bytes of CSV, that are looked at together
_CHOOSE = "choose columns by --feature_column_names"


@dataclass(frozen=True)
class Source:
    """What rows are read from, as errors call it.

    `columns` are those chosen of a table, none of an array. `depth` is 0 if they hold numbers, 1 for lists of numbers,
    2 for lists of lists.
    """

    name: str
    columns: tuple[str, ...] = ()
    depth: int = 0

    def place(self, row: int, step: int | None = None, line: int | None = None) -> str:
        """How to call a row, or a step of it, counted from 0; the line is counted from 1."""
        details = f" (line {line})" if line is not None else f", step {step + 1}," if step is not None else ""
        return f"row {row + 1}{details} of {self.name}"

    def misplaced(self, what: str, place: str, number: int) -> UsageError:
        """The error for `what` stands at a place where a number belongs, the one with this index in the vector."""
        column = f"column {number + 1}"
        if self.columns and self.depth:
            column = f"column '{self.columns[0]}', place {number + 1}"
        elif self.columns:
            column = f"column '{self.columns[number]}'"
        return UsageError(
            f"{place} has {what} in {column}, where a finite float32 number belongs; mend it or leave the row out"
        )


@dataclass(frozen=True)
class Block:
    """Some rows of a source, one after the other.

    `values` is float32 `[rows, F]`, or `[steps of all rows, F]` of series; `lengths` `[rows]` is the number of steps of
    each series, None of vectors.
    """

    values: np.ndarray
    lengths: np.ndarray | None

    def __len__(self) -> int:
        return len(self.values) if self.lengths is None else len(self.lengths)

    def to_arrow(self) -> pa.Array:
        """As datasets stores it: both types know F, and series come back as arrays faster than nested lists would."""
        width = self.values.shape[1]
        numbers = pa.array(self.values.reshape(-1))  # a view
        if self.lengths is None:
            return pa.FixedSizeListArray.from_arrays(numbers, width)
        steps = pa.ListArray.from_arrays(np.arange(0, len(numbers) + 1, width, dtype=np.int32), numbers)
        ends = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        series = pa.ListArray.from_arrays(ends, steps)
        return pa.ExtensionArray.from_storage(Array2D(shape=(None, width), dtype="float32")(), series)


def locate(index: int, lengths: np.ndarray | None) -> tuple[int, int | None]:
    """The row, and of series the step, that is in line `index` of a block's values."""
    if lengths is None:
        return index, None
    ends = np.cumsum(lengths)
    row = int(np.searchsorted(ends, index, side="right"))
    return row, index - int(ends[row] - lengths[row])


def array_kind(path: str) -> str:
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if ending not in _KINDS or (is_gzip(path) and ending in (".npy", ".npz")):
        raise UsageError(
            f"'{path}' has an unknown ending for features; known are {', '.join(_KINDS)}, all but the first two also "
            "followed by .gz"
        )
    return _KINDS[ending]


def open_feature_file(
    path: str, kind: str, args: DataArguments, columns: tuple[str, ...]
) -> tuple[Source, Iterator[Block]]:
    """What a file is called and holds, and its rows, not yet read."""
    if kind == "npy":
        if args.feature_column_names is not None:
            raise UsageError(f"'{path}' has no names of columns; leave out --feature_column_names")
        source = Source(f"'{path}'")
        return source, _array_blocks(_load_npy(path), None, source)
    if kind == "npz":
        source = Source(f"'{path}'")
        return source, _array_blocks(*_load_npz(path, args), source)
    types = _column_types(path, kind)
    source = choose_columns(types, f"'{path}'", args, columns)
    match kind:
        case "parquet":
            return source, column_blocks(_parquet_batches(path, source), source)
        case "json":
            return source, column_blocks(_json_batches(path, source), source)
        case _:
            return source, _csv_blocks(path, kind, source)


# ---- arrays


def _load_npy(path: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ARRAY_ERRORS as error:
        raise _no_array(path, error) from None


def _load_npz(path: str, args: DataArguments) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of features and, if there are any, the lengths of its series."""
    try:
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
            name = _choose_array(archive.files, path, args)
            array = np.asarray(archive[name])
            lengths = np.asarray(archive["lengths"]) if "lengths" in archive.files and array.ndim == 3 else None
    except UsageError:
        raise
    except ARRAY_ERRORS as error:
        raise _no_array(path, error) from None
    if lengths is not None:
        if lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu":
            raise UsageError(
                f"'{path}' has {lengths.dtype} lengths of shape {lengths.shape} beside {name} of shape {array.shape}; "
                "save one integer a series"
            )
        wrong = np.flatnonzero((lengths < 1) | (lengths > array.shape[1]))
        if wrong.size:
            raise UsageError(
                f"row {wrong[0] + 1} of '{path}' has the length {lengths[wrong[0]]}; lengths must be from 1 to "
                f"{array.shape[1]}, the padded one"
            )
    return array, lengths


def _choose_array(names: list[str], path: str, args: DataArguments) -> str:
    if args.feature_column_names is not None:
        if args.feature_column_names not in names:
            raise UsageError(
                f"'{path}' has no array '{args.feature_column_names}'; name one by --feature_column_names, out of: "
                f"{', '.join(names)}"
            )
        return args.feature_column_names
    candidates = [name for name in names if name not in ("lengths", args.label_column_name)]
    if len(candidates) != 1:
        candidates = [name for name in candidates if name in ("features", "X", "x")]
    if len(candidates) != 1:
        raise UsageError(
            f"'{path}' has the arrays {', '.join(names) or '(none)'}, and which of them holds the features is not "
            "clear; name it by --feature_column_names"
        )
    return candidates[0]


def _no_array(path: str, error: Exception) -> UsageError:
    reason = (str(error) or "it is damaged").splitlines()[0].rstrip(".")
    return UsageError(
        f"'{path}' cannot be read as an array of numbers: {reason}; write one with "
        "numpy.save, or with numpy.savez a padded array of series and their lengths"
    )


def _array_blocks(array: np.ndarray, lengths: np.ndarray | None, source: Source) -> Iterator[Block]:
    if array.dtype.kind not in "iuf":
        raise UsageError(f"{source.name} holds {array.dtype}, not numbers; save integers or floats")
    if array.ndim not in (2, 3) or 0 in array.shape[1:]:
        raise UsageError(
            f"{source.name} has the shape {array.shape}; save vectors as [rows, features], series as [rows, steps, "
            "features]"
        )
    rows = max(BLOCK_SIZE // array[:1].size, 1) if len(array) else 1
    for start in range(0, len(array), rows):
        with np.errstate(over="ignore"):  # it becomes infinite, which is refused
            values = np.ascontiguousarray(array[start : start + rows], dtype=np.float32)
        if array.ndim == 2:
            yield Block(values, None)
        elif lengths is None:
            yield Block(values.reshape(-1, values.shape[2]), np.full(len(values), values.shape[1]))
        else:
            real = lengths[start : start + rows].astype(np.int64)
            yield Block(values[np.arange(values.shape[1]) < real[:, None]], real)


# ---- columns


def _depth(kind: pa.DataType) -> int | None:
    """How many lists there are around the numbers, at most 2; None of what holds no numbers."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    # Nulls may become numbers further down, and if not, each is an empty cell to tell of.
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return depth if depth <= 2 and (numeric or pa.types.is_null(kind)) else None


def choose_columns(types: dict[str, pa.DataType], name: str, args: DataArguments, earlier: tuple[str, ...]) -> Source:
    """The columns to read, `earlier` ones in their order.

    Args:
        types: The type of each column by its name.
        name: What has the columns, as an error is to call it.
        earlier: The columns of data that were read before; none at first.
    """
    depths = {column: _depth(kind) for column, kind in types.items()}
    if args.feature_column_names is not None:
        wanted = args.feature_column_names
        # A name may hold a comma.
        columns = [wanted] if wanted in types else list(dict.fromkeys(map(str.strip, wanted.split(","))))
        for column in columns:
            if column not in types:
                raise UsageError(f"{name} has no column '{column}'; {_CHOOSE}, out of: {', '.join(types)}")
            if depths[column] is None:
                raise UsageError(f"column '{column}' of {name} holds {types[column]}, not numbers; {_CHOOSE}")
    else:
        if args.label_column_name not in (None, *types) and not earlier:
            raise UsageError(
                f"{name} has no column '{args.label_column_name}'; correct --label_column_name, out of: "
                f"{', '.join(types)}"
            )
        columns = [column for column, depth in depths.items() if depth is not None and column != args.label_column_name]
        if not columns:
            raise UsageError(f"{name} has no column of numbers; its columns are: {', '.join(types)}")
        different = sorted(set(columns) ^ set(earlier)) if earlier else []
        if different:
            raise UsageError(
                f"column '{different[0]}' holds numbers in only some of the data, and {name} "
                f"{'has' if different[0] in columns else 'lacks'} it; {_CHOOSE} that all of them have"
            )
        columns = list(earlier) or columns
        ignored = [column for column, depth in depths.items() if depth is None]
        if ignored:
            logger.info("%s: columns that hold no numbers are ignored: %s", name, ", ".join(ignored))
    lists = [column for column in columns if depths[column]]
    if lists and len(columns) > 1:
        other = next(column for column in columns if column != lists[0])
        raise UsageError(
            f"column '{lists[0]}' of {name} holds lists and cannot be joined with column '{other}'; choose it alone, "
            "or only columns of numbers, by --feature_column_names"
        )
    return Source(name, tuple(columns), depths[columns[0]])


def _column_types(path: str, kind: str) -> dict[str, pa.DataType]:
    """The type of each column by its name; of CSV and JSON as far as the first rows show it."""
    match kind:
        case "parquet":
            with open_parquet(path) as parquet:
                schema = parquet.schema_arrow
            names, types = schema.names, schema.types
        case "json":
            rows = list(islice(read_rows(path, "json"), BATCH_ROWS))
            names = list(dict.fromkeys(name for row in rows for name in row))
            types = [_json_type([row.get(name) for row in rows]) for name in names]
        case _:
            rows = [cells for _, cells in islice(_csv_rows(path, kind), BATCH_ROWS + 1)]
            names = rows[0] if rows else []
            types = [_csv_type([cells[i] for cells in rows[1:] if i < len(cells)]) for i in range(len(names))]
            if names and all(map(_is_number, names)):
                raise UsageError(f"the first line of '{path}' is all numbers; give it a header line with column names")
    if not names:
        raise UsageError(f"'{path}' has no rows; give data with at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"'{path}' has several columns named '{twice}'; give each a name of its own")
    return dict(zip(names, types, strict=True))


def column_blocks(batches: Iterator[list[pa.Array]], source: Source) -> Iterator[Block]:
    """Rows out of batches of the chosen columns."""
    first_row, width = 0, None
    for columns in batches:
        if source.depth == 0:
            block = _join_columns(columns, source, first_row)
        else:
            block = _unpack_lists(columns[0], source, first_row, width)
        width = block.values.shape[1]
        yield block
        first_row += len(block)


def _join_columns(columns: list[pa.Array], source: Source, first_row: int) -> Block:
    for number, column in enumerate(columns):
        if column.null_count:
            raise source.misplaced("an empty cell", source.place(first_row + _first_null(column)), number)
    return Block(np.stack([plain_numbers(column) for column in columns], axis=1), None)


def _unpack_lists(array: pa.Array, source: Source, first_row: int, width: int | None) -> Block:
    """Rows out of the one column of lists; `width` is that of earlier rows, if there are any."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    lengths = None
    outer, steps = list_lengths(array), array
    if source.depth == 2:
        lengths, steps = outer, array.flatten()
    if not outer.all():
        what = "an empty series" if source.depth == 2 else "an empty list"
        place = source.place(first_row + int(outer.argmin()))
        raise UsageError(f"{place} has {what} in column '{source.columns[0]}'; fill it or leave the row out")

    widths, numbers = list_lengths(steps), steps.flatten()
    width = width or int(widths[0])
    wrong = np.flatnonzero((widths != width) | (widths == 0))
    if wrong.size:
        row, step = locate(int(wrong[0]), lengths)
        raise UsageError(
            f"{source.place(first_row + row, step)} has {widths[wrong[0]]} numbers in column '{source.columns[0]}', "
            f"where {width or 'some'} are expected as before it; mend it or leave the row out"
        )
    if numbers.null_count:
        index, number = divmod(_first_null(numbers), width)
        row, step = locate(index, lengths)
        raise source.misplaced("an empty cell", source.place(first_row + row, step), number)
    return Block(plain_numbers(numbers).reshape(-1, width), lengths)


def list_lengths(array: pa.Array) -> np.ndarray:
    """Lengths of lists; a missing one has none."""
    return pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)


def _first_null(array: pa.Array) -> int:
    return int(array.is_null().index(True).as_py())


def plain_numbers(array: pa.Array) -> np.ndarray:
    """All numbers in an array of numbers, or of lists of them, as float32."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while _depth(array.type):
        array = array.flatten()
    return array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)


def _parquet_batches(path: str, source: Source) -> Iterator[list[pa.Array]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=list(source.columns)):
            yield batch.select(source.columns).columns


# ---- JSON


_JSON_TYPES = {
    int: pa.float64(),
    float: pa.float64(),
    bool: pa.bool_(),
    str: pa.string(),
    dict: pa.struct([]),
    type(None): pa.null(),
}


def _json_type(values: list[Any]) -> pa.DataType:
    """The type of a column of JSON: that of numbers if it has any, so that others are found out."""
    kinds = []
    for value in values:
        depth = 0
        while isinstance(value, list):
            value, depth = value[0] if value else None, depth + 1
        if value is not None:
            kinds.append(_nested(_JSON_TYPES[type(value)], depth))
    numbers = [kind for kind in kinds if _depth(kind) is not None]
    return max(numbers, key=_depth) if numbers else next(iter(kinds), pa.null())


def _nested(kind: pa.DataType, depth: int) -> pa.DataType:
    return pa.list_(_nested(kind, depth - 1)) if depth else kind


def _json_batches(path: str, source: Source) -> Iterator[list[pa.Array]]:
    rows, first_row = read_rows(path, "json"), 0
    while batch := list(islice(rows, BATCH_ROWS)):
        yield [
            _json_column([row.get(name) for row in batch], number, source, first_row)
            for number, name in enumerate(source.columns)
        ]
        first_row += len(batch)


def _json_column(values: list[Any], number: int, source: Source, first_row: int) -> pa.Array:
    """`values`, those of the column of this number, as an array."""
    odd = _first_odd(values, source.depth + 1)
    if odd is not None:
        (row, *path), what = odd
        if len(path) < source.depth:
            raise UsageError(
                f"{source.place(first_row + row, *path)} has {what} in column '{source.columns[0]}', where a list "
                "belongs; mend it or leave the row out"
            )
        place = source.place(first_row + row, *path[:-1])
        raise source.misplaced(what, place, path[-1] if path else number)
    try:
        return pa.array(values, type=_nested(pa.float64(), source.depth))
    except pa.ArrowException:
        raise UsageError(
            f"column '{source.columns[number]}' of {source.name} holds integers of more than 53 bits; write them as "
            "floats, such as 1e18"
        ) from None


def _first_odd(values: list[Any], depth: int) -> tuple[tuple[int, ...], str] | None:
    """Where and what the first thing is that is neither a number nor missing, in lists of this depth, at least 1."""
    if depth == 1 and set(map(type, values)) <= {int, float, type(None)}:
        return None
    for number, value in enumerate(values):
        if depth > 1 and isinstance(value, list):
            odd = _first_odd(value, depth - 1)
            if odd is not None:
                return (number, *odd[0]), odd[1]
        elif value is not None and (depth > 1 or type(value) not in (int, float)):
            return (number,), f"{value!r:.40}"
    return None


# ---- CSV


def _csv_rows(path: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows of a file, each with the number of its line, the last one if it has several."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long text beside the numbers
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=_DELIMITERS[kind], strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise UsageError(f"line {reader.line_num} of '{path}' is not valid CSV: {error}") from None


def _csv_type(cells: list[str]) -> pa.DataType:
    """That of numbers if a cell is one, so that others are found out; that of nothing if all cells are blank."""
    if any(map(_is_number, cells)):
        return pa.float32()
    return pa.string() if any(map(str.strip, cells)) else pa.null()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python's own


def _csv_blocks(path: str, kind: str, source: Source) -> Iterator[Block]:
    rows = 0
    with open_bytes(path) as file:
        try:
            reader = pa_csv.open_csv(
                file,
                pa_csv.ReadOptions(block_size=BLOCK_SIZE),
                pa_csv.ParseOptions(delimiter=_DELIMITERS[kind], newlines_in_values=True),
                pa_csv.ConvertOptions(
                    include_columns=source.columns,
                    column_types=dict.fromkeys(source.columns, pa.float32()),
                    null_values=[""],
                ),
            )
            for batch in reader:
                values = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
                if not np.isfinite(values).all():  # empty cells are NaN here
                    raise _csv_error(path, kind, source, rows, "a number is not finite")
                yield Block(values, None)
                rows += len(values)
        except pa.ArrowException as error:
            raise _csv_error(path, kind, source, rows, str(error).splitlines()[0]) from None


def _csv_error(path: str, kind: str, source: Source, first_row: int, reason: str) -> UsageError:
    """The error for the first thing that is wrong from `first_row` on, found by a slower reader that knows lines.

    `reason` is told where it finds nothing.
    """
    lines = _csv_rows(path, kind)
    _, header = next(lines)
    columns = [header.index(name) for name in source.columns]
    for row, (line, cells) in enumerate(lines):
        place = source.place(row, line=line)
        if len(cells) != len(header):
            return UsageError(
                f"{place} has {len(cells)} values for {len(header)} columns; mend it, with double quotes around values "
                "that hold the separator"
            )
        for number, column in enumerate(columns if row >= first_row else []):
            cell = cells[column].strip()
            if not cell:
                return source.misplaced("an empty cell", place, number)
            if not _is_number(cell):
                return source.misplaced(f"{cell!r:.40}", place, number)
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(cell)):
                    return source.misplaced(cell, place, number)
    return UsageError(f"{source.name} cannot be read as numbers: {reason}; write it anew as plain CSV")
