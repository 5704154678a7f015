"""Reader of features in CSV and TSV files."""

import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from ..errors import UsageError
from .feature_blocks import BATCH_ROWS, BLOCK_SIZE, Block, Provenance
from .file_readers import DELIMITERS, csv_separator, csv_table, csv_width_error, open_bytes

_DECIMAL_COMMA = re.compile(r"\s*[+-]?[\d.]*,\d+(e[+-]?\d+)?\s*", re.IGNORECASE)


def csv_column_types(path: str, kind: str) -> tuple[list[str], list[pa.DataType]]:
    """Return the names of the columns and their types, inferred from the first rows.

    Raises:
        UsageError: The first line looks like a row of data.
    """
    names, lines = csv_table(path, kind)
    rows = [cells for _, cells in islice(lines, BATCH_ROWS)]
    # A row of decimal commas is split at them, if its separator is another one.
    parts = [part for name in names for part in name.split(";")]
    numbers = [part for part in parts if is_number(part)]
    # pandas names columns 0, 1, 2, ... by default.
    is_data = len(numbers) == len(parts) and numbers != [str(number) for number in range(len(names))]
    if names and (is_data or not all(name.strip().isdecimal() for name in numbers)):
        raise UsageError(
            f"The first line of '{path}' holds numbers ({', '.join(numbers[:3])}) instead of column names. Add a "
            "header line."
        )
    return names, [_csv_type([cells[i] for cells in rows if i < len(cells)]) for i in range(len(names))]


def _csv_type(cells: list[str]) -> pa.DataType:
    """Return the type of a CSV column: null if all cells are blank; numeric if one is a number, or all have commas."""
    filled = list(filter(str.strip, cells))
    if not filled:
        return pa.null()
    return pa.float32() if any(map(is_number, filled)) or all(map(has_decimal_comma, filled)) else pa.string()


def is_number(cell: str) -> bool:
    """Return whether a cell is a number, as `float` and Arrow read it."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python accepts 1_000


def has_decimal_comma(cell: str) -> bool:
    """Return whether a cell is a number with a decimal comma, which is not read."""
    return _DECIMAL_COMMA.fullmatch(cell) is not None


def csv_blocks(path: str, kind: str, source: Provenance) -> Iterator[Block]:
    """Yield the chosen columns as blocks of rows."""
    rows = 0
    with open_bytes(path) as file:
        try:
            reader = pa_csv.open_csv(
                file,
                pa_csv.ReadOptions(block_size=BLOCK_SIZE),
                pa_csv.ParseOptions(delimiter=csv_separator(path, DELIMITERS[kind]), newlines_in_values=True),
                pa_csv.ConvertOptions(
                    include_columns=source.columns,
                    column_types=dict.fromkeys(source.columns, pa.float64()),
                    null_values=[""],
                ),
            )
            for batch in reader:
                values = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
                with np.errstate(over="ignore"):
                    finite = np.isfinite(values.astype(np.float32))
                if not finite.all():  # empty cells are NaN here
                    raise _csv_error(path, kind, source, rows, "a number is not finite")
                yield Block(values, None)
                rows += len(values)
        except pa.ArrowException as error:
            raise _csv_error(path, kind, source, rows, str(error).splitlines()[0]) from None


def _csv_error(path: str, kind: str, source: Provenance, first_row: int, reason: str) -> UsageError:
    """Return the error for the first invalid value from `first_row` on, with its line.

    A slower reader finds it, because Arrow's reports no lines. If it finds none, the error has `reason`.
    """
    header, lines = csv_table(path, kind)
    columns = [header.index(name) for name in source.columns]
    for row, (line, cells) in enumerate(lines):
        place = source.locate(row, line=line)
        if len(cells) != len(header):
            return csv_width_error(place, cells, header)
        for number, column in enumerate(columns if row >= first_row else []):
            cell = cells[column].strip()
            if not cell:
                return source.invalid_value_error("an empty cell", place, number)
            if has_decimal_comma(cell):
                remedy = "Write a decimal point, because commas are not read (pandas.read_csv has decimal=',')."
                return source.invalid_value_error(repr(cell), place, number, remedy)
            if not is_number(cell):
                return source.invalid_value_error(f"{cell!r:.40}", place, number)
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(cell)):
                    return source.invalid_value_error(cell, place, number)
    return UsageError(f"{source.name} cannot be read as numbers: {reason}. Write it again as plain CSV.")
