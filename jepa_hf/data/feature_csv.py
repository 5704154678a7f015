"""Reader of features in CSV and TSV files."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from ..errors import UsageError
from ..utils.counts import counted
from .feature_blocks import BATCH_ROWS, BLOCK_SIZE, Block, Provenance
from .file_readers import csv_lines, csv_separator, open_bytes

DELIMITERS = {"csv": ",", "tsv": "\t"}


def _csv_rows(path: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows that are not empty, each with its (last) line number."""
    return ((line, cells) for line, cells in csv_lines(path, DELIMITERS[kind]) if cells)


def csv_column_types(path: str, kind: str) -> tuple[list[str], list[pa.DataType]]:
    """Return the names of the columns and their types, inferred from the first rows.

    Raises:
        UsageError: The first line looks like a row of data.
    """
    rows = [cells for _, cells in islice(_csv_rows(path, kind), BATCH_ROWS + 1)]
    names = rows[0] if rows else []
    numbers = [name for name in names if is_number(name)]
    # pandas names columns 0, 1, 2, ... by default.
    is_data = len(numbers) == len(names) and numbers != [str(number) for number in range(len(names))]
    if names and (is_data or not all(name.strip().isdecimal() for name in numbers)):
        raise UsageError(
            f"The first line of '{path}' holds numbers ({', '.join(numbers[:3])}) instead of column names. Add a "
            "header line."
        )
    return names, [_csv_type([cells[i] for cells in rows[1:] if i < len(cells)]) for i in range(len(names))]


def _csv_type(cells: list[str]) -> pa.DataType:
    """Return the type of a CSV column: numeric if any cell is a number, null if all are blank."""
    if any(map(is_number, cells)):
        return pa.float32()
    return pa.string() if any(map(str.strip, cells)) else pa.null()


def is_number(cell: str) -> bool:
    """Return whether a cell is a number, as `float` and Arrow read it."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python accepts 1_000


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
                f"{place} has {counted(len(cells), 'value')} for {counted(len(header), 'column')}. Fix it, with "
                "double quotes around values "
                "that hold the separator."
            )
        for number, column in enumerate(columns if row >= first_row else []):
            cell = cells[column].strip()
            if not cell:
                return source.invalid_value_error("an empty cell", place, number)
            if not is_number(cell):
                return source.invalid_value_error(f"{cell!r:.40}", place, number)
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(cell)):
                    return source.invalid_value_error(cell, place, number)
    return UsageError(f"{source.name} cannot be read as numbers: {reason}. Write it again as plain CSV.")
