"""`Block`, consecutive rows of features, and the conversion of table columns to blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Array2D

from ..errors import UsageError

BATCH_ROWS = 1000
BLOCK_SIZE = 2**24  # numbers of an array, or bytes of CSV, per block


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

    def invalid_value_error(
        self, what: str, place: str, number: int, remedy: str = "Fix it or remove the row."
    ) -> UsageError:
        """Return the error for `what` instead of the number with this index in the vector."""
        column = f"column {number + 1}"
        if self.columns and self.depth:
            column = f"column '{self.columns[0]}', position {number + 1}"
        elif self.columns:
            column = f"column '{self.columns[number]}'"
        return UsageError(f"{place} has {what} in {column} instead of a finite float32 number. {remedy}")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a source.

    Attributes:
        values: `[rows, F]`; of series `[steps of all rows, F]`. float32, or float64 if the source is more precise.
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


def list_depth(kind: pa.DataType) -> int | None:
    """Return the number of lists around the numbers, 0 to 2; None if there are no numbers."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    # Nulls may become numbers in later rows; otherwise they raise the error of an empty cell.
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return depth if depth <= 2 and (numeric or pa.types.is_null(kind)) else None


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
            raise source.invalid_value_error("an empty cell", source.locate(first_row + first_null(column)), number)
    return Block(np.stack([to_floats(column) for column in columns], axis=1), None)


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
        index, number = divmod(first_null(numbers), width)
        row, step = locate(index, lengths)
        raise source.invalid_value_error("an empty cell", source.locate(first_row + row, step), number)
    return Block(to_floats(numbers).reshape(-1, width), lengths)


def list_lengths(array: pa.Array) -> np.ndarray:
    """Return the lengths of lists; 0 for a missing list."""
    return pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)


def first_null(array: pa.Array) -> int:
    """Return the index of the first null."""
    return int(array.is_null().index(True).as_py())


def to_floats(array: pa.Array) -> np.ndarray:
    """Return all numbers of an array of (lists of) numbers; as float64, unless they are float32 or coarser."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while list_depth(array.type):
        array = array.flatten()
    kind = pa.float32() if array.type in (pa.float16(), pa.float32()) else pa.float64()
    return array.cast(kind, safe=False).to_numpy(zero_copy_only=False)
