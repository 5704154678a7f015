"""Reader of features in JSON and JSON Lines files."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from ..errors import UsageError
from .feature_blocks import BATCH_ROWS, Provenance, list_depth
from .file_readers import read_rows

_JSON_TYPES = {
    int: pa.float64(),
    float: pa.float64(),
    bool: pa.bool_(),
    str: pa.string(),
    dict: pa.struct([]),
    type(None): pa.null(),
}


def json_column_types(path: str) -> tuple[list[str], list[pa.DataType]]:
    """Return the names of the columns and their types, inferred from the first rows."""
    objects = list(islice(read_rows(path, "json"), BATCH_ROWS))
    names = list(dict.fromkeys(name for row in objects for name in row))
    return names, [_json_type([row.get(name) for row in objects]) for name in names]


def _json_type(values: list[Any]) -> pa.DataType:
    """Return the type of a JSON column: numeric if any value is a number, else of the first one."""
    kinds = []
    for value in values:
        depth = 0
        while isinstance(value, list):
            value, depth = value[0] if value else None, depth + 1
        if value is not None:
            kinds.append(_nested(_JSON_TYPES[type(value)], depth))
    numbers = [kind for kind in kinds if list_depth(kind) is not None]
    return max(numbers, key=lambda kind: list_depth(kind) or 0) if numbers else next(iter(kinds), pa.null())


def _nested(kind: pa.DataType, depth: int) -> pa.DataType:
    return pa.list_(_nested(kind, depth - 1)) if depth else kind


def json_batches(path: str, source: Provenance) -> Iterator[list[pa.Array]]:
    """Yield the chosen columns of `BATCH_ROWS` rows at a time."""
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
                "list. Fix it or remove the row."
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
    """Return the indices and the text of the first value in lists of this depth that is neither a number nor null."""
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
