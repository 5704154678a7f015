"""Readers of feature files (arrays, tables, JSON) as blocks of float32 numbers."""

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
from .file_readers import csv_lines, is_gzip, open_bytes, open_parquet, read_rows

logger = logging.getLogger(__name__)

# Errors of numpy and zipfile on damaged files. An array's header is a Python literal, hence also
# syntax errors.
ARRAY_ERRORS = (
    ValueError, EOFError, SyntaxError, TokenError, TypeError, MemoryError, OverflowError, RuntimeError, struct.error,
    zlib.error, BadZipFile,
)  # fmt: skip
_FORMAT_BY_SUFFIX = {
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
BLOCK_SIZE = 2**24  # numbers of an array, or bytes of CSV, per block
_CHOOSE_COLUMNS_HINT = "Choose columns with --feature_column_names"


@dataclass(frozen=True)
class Provenance:
    """The origin of rows, for error messages.

    Attributes:
        name: Description of the file or split.
        columns: Chosen columns of a table; empty for an array.
        depth: 0 if the columns hold numbers, 1 for lists of numbers, 2 for lists of lists.
    """

    name: str
    columns: tuple[str, ...] = ()
    depth: int = 0

    def locate(self, row: int, step: int | None = None, line: int | None = None) -> str:
        """Describe a row, or a step of it. Both are counted from 0, and the line from 1."""
        details = f" (line {line})" if line is not None else f", step {step + 1}," if step is not None else ""
        return f"Row {row + 1}{details} of {self.name}"

    def invalid_value_error(self, what: str, place: str, number: int) -> UsageError:
        """Return the error for `what` instead of the number with this index in the vector."""
        column = f"column {number + 1}"
        if self.columns and self.depth:
            column = f"column '{self.columns[0]}', position {number + 1}"
        elif self.columns:
            column = f"column '{self.columns[number]}'"
        return UsageError(
            f"{place} has {what} in {column} instead of a finite float32 number. Fix it or remove the row."
        )


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a source.

    Attributes:
        values: float32 `[rows, F]`; of series `[steps of all rows, F]`.
        lengths: `[rows]`, number of steps of each series; None for vectors.
    """

    values: np.ndarray
    lengths: np.ndarray | None

    def __len__(self) -> int:
        return len(self.values) if self.lengths is None else len(self.lengths)

    def to_arrow(self) -> pa.Array:
        """Convert to the storage type of datasets, which loads faster than nested lists."""
        width = self.values.shape[1]
        numbers = pa.array(self.values.reshape(-1))  # no copy
        if self.lengths is None:
            return pa.FixedSizeListArray.from_arrays(numbers, width)
        steps = pa.ListArray.from_arrays(np.arange(0, len(numbers) + 1, width, dtype=np.int32), numbers)
        ends = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        series = pa.ListArray.from_arrays(ends, steps)
        return pa.ExtensionArray.from_storage(Array2D(shape=(None, width), dtype="float32")(), series)


def locate(index: int, lengths: np.ndarray | None) -> tuple[int, int | None]:
    """Return the row, and for series the step, at an index of a block's values."""
    if lengths is None:
        return index, None
    ends = np.cumsum(lengths)
    row = int(np.searchsorted(ends, index, side="right"))
    return row, index - int(ends[row] - lengths[row])


def array_format(path: str) -> str:
    """Return the kind of a feature file, a value of `_FORMAT_BY_SUFFIX`, from its suffix.

    Raises:
        UsageError: The suffix is unknown.
    """
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if suffix not in _FORMAT_BY_SUFFIX or (is_gzip(path) and suffix in (".npy", ".npz")):
        raise UsageError(
            f"'{path}' has an unknown suffix for features. Use one of {', '.join(_FORMAT_BY_SUFFIX)}, all but the "
            "first two "
            "optionally followed by .gz."
        )
    return _FORMAT_BY_SUFFIX[suffix]


def open_feature_file(
    path: str, kind: str, args: DataArguments, columns: tuple[str, ...]
) -> tuple[Provenance, Iterator[Block]]:
    """Return the source of a file and its rows, which are read lazily.

    Args:
        path: Of the file.
        kind: See `array_format`.
        args: Names of columns.
        columns: Columns of earlier data, see `choose_columns`.
    """
    if kind == "npy":
        if args.feature_column_names is not None:
            raise UsageError(f"'{path}' has no column names. Omit --feature_column_names.")
        source = Provenance(f"'{path}'")
        return source, _array_blocks(_load_npy(path), None, source)
    if kind == "npz":
        source = Provenance(f"'{path}'")
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
        raise _array_error(path, error) from None


def _load_npz(path: str, args: DataArguments) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the array of features and, if the file has them, the lengths of its series."""
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            name = _choose_array(archive.files, path, args)
            array = np.asarray(archive[name])
            lengths = np.asarray(archive["lengths"]) if "lengths" in archive.files and array.ndim == 3 else None
    except UsageError:
        raise
    except ARRAY_ERRORS as error:
        raise _array_error(path, error) from None
    if lengths is not None:
        if lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu":
            raise UsageError(
                f"'{path}' has {lengths.dtype} lengths of shape {lengths.shape} for {name} of shape {array.shape}. "
                "Save one integer per series."
            )
        invalid = np.flatnonzero((lengths < 1) | (lengths > array.shape[1]))
        if invalid.size:
            raise UsageError(
                f"Row {invalid[0] + 1} of '{path}' has the length {lengths[invalid[0]]}. Lengths must be from 1 to the "
                f"padded length {array.shape[1]}."
            )
    return array, lengths


def _choose_array(names: list[str], path: str, args: DataArguments) -> str:
    """Return the name of the array of features: from `args`, the only one, or a usual name."""
    if args.feature_column_names is not None:
        if args.feature_column_names not in names:
            raise UsageError(
                f"'{path}' has no array '{args.feature_column_names}'. Name one with --feature_column_names, out of: "
                f"{', '.join(names)}."
            )
        return args.feature_column_names
    candidates = [name for name in names if name not in ("lengths", args.label_column_name)]
    if len(candidates) != 1:
        candidates = [name for name in candidates if name in ("features", "X", "x")]
    if len(candidates) != 1:
        raise UsageError(
            f"'{path}' has the arrays {', '.join(names) or '(none)'}, of which none or several may hold the features. "
            "Name one with --feature_column_names."
        )
    return candidates[0]


def _array_error(path: str, error: Exception) -> UsageError:
    reason = (str(error) or "it is damaged").splitlines()[0].rstrip(".")
    return UsageError(
        f"'{path}' cannot be read as an array of numbers: {reason}. Write it with numpy.save, or a padded array of "
        "series and their lengths with numpy.savez."
    )


def _array_blocks(array: np.ndarray, lengths: np.ndarray | None, source: Provenance) -> Iterator[Block]:
    if array.dtype.kind not in "iuf":
        raise UsageError(f"{source.name} holds {array.dtype}, not numbers. Save integers or floats.")
    if array.ndim not in (2, 3) or 0 in array.shape[1:]:
        raise UsageError(
            f"{source.name} has the shape {array.shape}. Save vectors as [rows, features], series as [rows, steps, "
            "features]."
        )
    rows = max(BLOCK_SIZE // array[:1].size, 1) if len(array) else 1
    for start in range(0, len(array), rows):
        with np.errstate(over="ignore"):  # overflow becomes infinite, which is an error later
            values = np.ascontiguousarray(array[start : start + rows], dtype=np.float32)
        if array.ndim == 2:
            yield Block(values, None)
        elif lengths is None:
            yield Block(values.reshape(-1, values.shape[2]), np.full(len(values), values.shape[1]))
        else:
            block_lengths = lengths[start : start + rows].astype(np.int64)
            yield Block(values[np.arange(values.shape[1]) < block_lengths[:, None]], block_lengths)


# ---- columns


def _list_depth(kind: pa.DataType) -> int | None:
    """Return the number of lists around the numbers, 0 to 2; None if there are no numbers."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    # Nulls may become numbers in later rows; otherwise they raise the error of an empty cell.
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return depth if depth <= 2 and (numeric or pa.types.is_null(kind)) else None


def choose_columns(
    types: dict[str, pa.DataType], name: str, args: DataArguments, required_columns: tuple[str, ...]
) -> Provenance:
    """Choose the columns to read.

    Args:
        types: The type of each column by name.
        name: Description of the data for errors.
        args: `feature_column_names` or `label_column_name`, if the user set them.
        required_columns: Columns of earlier data, which are required in the same order; empty at first.

    Raises:
        UsageError: A column is missing or holds no numbers, or lists are combined with other
            columns.
    """
    depths = {column: depth for column, kind in types.items() if (depth := _list_depth(kind)) is not None}
    if args.feature_column_names is not None:
        columns = _named_columns(types, depths, name, args.feature_column_names)
    else:
        columns = _numeric_columns(types, depths, name, args.label_column_name, required_columns)
    lists = [column for column in columns if depths[column]]
    if lists and len(columns) > 1:
        other = next(column for column in columns if column != lists[0])
        raise UsageError(
            f"Column '{lists[0]}' of {name} holds lists and cannot be joined with column '{other}'. Choose it alone, "
            "or only columns of numbers, with --feature_column_names."
        )
    return Provenance(name, tuple(columns), depths[columns[0]])


def _named_columns(types: dict[str, pa.DataType], depths: dict[str, int], name: str, names: str) -> list[str]:
    # A name may contain a comma.
    columns = [names] if names in types else list(dict.fromkeys(map(str.strip, names.split(","))))
    for column in columns:
        if column not in types:
            raise UsageError(f"No column '{column}' in {name}. {_CHOOSE_COLUMNS_HINT}, out of: {', '.join(types)}.")
        if column not in depths:
            raise UsageError(f"Column '{column}' of {name} holds {types[column]}, not numbers. {_CHOOSE_COLUMNS_HINT}.")
    return columns


def _numeric_columns(
    types: dict[str, pa.DataType], depths: dict[str, int], name: str, label: str | None, earlier: tuple[str, ...]
) -> list[str]:
    if label not in (None, *types) and not earlier:
        raise UsageError(f"No column '{label}' in {name}. Correct --label_column_name, out of: {', '.join(types)}.")
    columns = [column for column in depths if column != label]
    if not columns:
        raise UsageError(f"No column of numbers in {name}. Its columns are: {', '.join(types)}.")
    different = sorted(set(columns) ^ set(earlier)) if earlier else []
    if different:
        raise UsageError(
            f"Column '{different[0]}' holds numbers in only some of the data: {name} "
            f"{'has' if different[0] in columns else 'lacks'} it. {_CHOOSE_COLUMNS_HINT} that are in all of them."
        )
    ignored = [column for column in types if column not in depths]
    if ignored:
        logger.info("%s: columns without numbers are ignored: %s", name, ", ".join(ignored))
    return list(earlier) or columns


def _column_types(path: str, kind: str) -> dict[str, pa.DataType]:
    """Return the type of each column by name; for CSV and JSON inferred from the first rows."""
    match kind:
        case "parquet":
            with open_parquet(path) as parquet:
                schema = parquet.schema_arrow
            names, types = schema.names, schema.types
        case "json":
            objects = list(islice(read_rows(path, "json"), BATCH_ROWS))
            names = list(dict.fromkeys(name for row in objects for name in row))
            types = [_json_type([row.get(name) for row in objects]) for name in names]
        case _:
            rows = [cells for _, cells in islice(_csv_rows(path, kind), BATCH_ROWS + 1)]
            names = rows[0] if rows else []
            types = [_csv_type([cells[i] for cells in rows[1:] if i < len(cells)]) for i in range(len(names))]
            if names and all(map(_is_number, names)):
                raise UsageError(f"The first line of '{path}' is all numbers. Add a header line with column names.")
    if not names:
        raise UsageError(f"No rows in '{path}'. Provide data with at least one.")
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"'{path}' has several columns named '{duplicate}'. Give each a name of its own.")
    return dict(zip(names, types, strict=True))


def column_blocks(batches: Iterator[list[pa.Array]], source: Provenance) -> Iterator[Block]:
    """Turn batches of the chosen columns into blocks of rows.

    Raises:
        UsageError: A number is missing, or a row or step has another width.
    """
    first_row, width = 0, None
    for columns in batches:
        if source.depth == 0:
            block = _join_columns(columns, source, first_row)
        else:
            block = _unpack_lists(columns[0], source, first_row, width)
        width = block.values.shape[1]
        yield block
        first_row += len(block)


def _join_columns(columns: list[pa.Array], source: Provenance, first_row: int) -> Block:
    for number, column in enumerate(columns):
        if column.null_count:
            raise source.invalid_value_error("an empty cell", source.locate(first_row + _first_null(column)), number)
    return Block(np.stack([to_float32(column) for column in columns], axis=1), None)


def _unpack_lists(array: pa.Array, source: Provenance, first_row: int, width: int | None) -> Block:
    """Turn a column of lists into rows; `width` is the width of earlier rows, if any."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    lengths = None
    outer, steps = list_lengths(array), array
    if source.depth == 2:
        lengths, steps = outer, array.flatten()
    if not outer.all():
        what = "an empty series" if source.depth == 2 else "an empty list"
        place = source.locate(first_row + int(outer.argmin()))
        raise UsageError(f"{place} has {what} in column '{source.columns[0]}'. Fill it or remove the row.")

    widths, numbers = list_lengths(steps), steps.flatten()
    width = width or int(widths[0])
    invalid = np.flatnonzero((widths != width) | (widths == 0))
    if invalid.size:
        row, step = locate(int(invalid[0]), lengths)
        raise UsageError(
            f"{source.locate(first_row + row, step)} has {widths[invalid[0]]} numbers in column '{source.columns[0]}', "
            f"expected {width or 'at least 1'}. Fix it or remove the row."
        )
    if numbers.null_count:
        index, number = divmod(_first_null(numbers), width)
        row, step = locate(index, lengths)
        raise source.invalid_value_error("an empty cell", source.locate(first_row + row, step), number)
    return Block(to_float32(numbers).reshape(-1, width), lengths)


def list_lengths(array: pa.Array) -> np.ndarray:
    """Return the lengths of lists; 0 for a missing list."""
    return pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)


def _first_null(array: pa.Array) -> int:
    return int(array.is_null().index(True).as_py())


def to_float32(array: pa.Array) -> np.ndarray:
    """Return all numbers of an array of (lists of) numbers as float32."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while _list_depth(array.type):
        array = array.flatten()
    return array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)


def _parquet_batches(path: str, source: Provenance) -> Iterator[list[pa.Array]]:
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
    """Return the type of a JSON column: numeric if any value is a number, else of the first one."""
    kinds = []
    for value in values:
        depth = 0
        while isinstance(value, list):
            value, depth = value[0] if value else None, depth + 1
        if value is not None:
            kinds.append(_nested(_JSON_TYPES[type(value)], depth))
    numbers = [kind for kind in kinds if _list_depth(kind) is not None]
    return max(numbers, key=lambda kind: _list_depth(kind) or 0) if numbers else next(iter(kinds), pa.null())


def _nested(kind: pa.DataType, depth: int) -> pa.DataType:
    return pa.list_(_nested(kind, depth - 1)) if depth else kind


def _json_batches(path: str, source: Provenance) -> Iterator[list[pa.Array]]:
    rows, first_row = read_rows(path, "json"), 0
    while batch := list(islice(rows, BATCH_ROWS)):
        yield [
            _json_column([row.get(name) for row in batch], number, source, first_row)
            for number, name in enumerate(source.columns)
        ]
        first_row += len(batch)


def _json_column(values: list[Any], number: int, source: Provenance, first_row: int) -> pa.Array:
    """Convert the values of the column with this number to an array."""
    invalid = _first_invalid(values, source.depth + 1)
    if invalid is not None:
        (row, *path), what = invalid
        if len(path) < source.depth:
            raise UsageError(
                f"{source.locate(first_row + row, *path)} has {what} in column '{source.columns[0]}' instead of a "
                "list. "
                "Fix it or remove the row."
            )
        place = source.locate(first_row + row, *path[:-1])
        raise source.invalid_value_error(what, place, path[-1] if path else number)
    try:
        return pa.array(values, type=_nested(pa.float64(), source.depth))
    except pa.ArrowException:
        raise UsageError(
            f"Column '{source.columns[number]}' of {source.name} holds integers of more than 53 bits. Write them as "
            "floats, such as 1e18."
        ) from None


def _first_invalid(values: list[Any], depth: int) -> tuple[tuple[int, ...], str] | None:
    """Return the indices and the text of the first value that is neither a number nor missing.

    Args:
        values: Nested lists.
        depth: Of the lists, at least 1.
    """
    if depth == 1 and set(map(type, values)) <= {int, float, type(None)}:
        return None
    for number, value in enumerate(values):
        if depth > 1 and isinstance(value, list):
            invalid = _first_invalid(value, depth - 1)
            if invalid is not None:
                return (number, *invalid[0]), invalid[1]
        elif value is not None and (depth > 1 or type(value) not in (int, float)):
            return (number,), f"{value!r:.40}"
    return None


# ---- CSV


def _csv_rows(path: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows that are not empty, each with its (last) line number."""
    return ((line, cells) for line, cells in csv_lines(path, _DELIMITERS[kind]) if cells)


def _csv_type(cells: list[str]) -> pa.DataType:
    """Return the type of a CSV column: numeric if any cell is a number, null if all are blank."""
    if any(map(_is_number, cells)):
        return pa.float32()
    return pa.string() if any(map(str.strip, cells)) else pa.null()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python accepts 1_000


def _csv_blocks(path: str, kind: str, source: Provenance) -> Iterator[Block]:
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


def _csv_error(path: str, kind: str, source: Provenance, first_row: int, reason: str) -> UsageError:
    """Return the error for the first invalid value from `first_row` on, with its line.

    A slower reader finds it, because Arrow's reports no lines. If it finds none, the error has
    `reason`.
    """
    lines = _csv_rows(path, kind)
    _, header = next(lines)
    columns = [header.index(name) for name in source.columns]
    for row, (line, cells) in enumerate(lines):
        place = source.locate(row, line=line)
        if len(cells) != len(header):
            return UsageError(
                f"{place} has {len(cells)} values for {len(header)} columns. Fix it, with double quotes around values "
                "that hold the separator."
            )
        for number, column in enumerate(columns if row >= first_row else []):
            cell = cells[column].strip()
            if not cell:
                return source.invalid_value_error("an empty cell", place, number)
            if not _is_number(cell):
                return source.invalid_value_error(f"{cell!r:.40}", place, number)
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(cell)):
                    return source.invalid_value_error(cell, place, number)
    return UsageError(f"{source.name} cannot be read as numbers: {reason}. Write it again as plain CSV.")
