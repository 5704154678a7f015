"""Choice of the columns of a table that are features."""

import logging
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa

from ..errors import UsageError
from .arguments import DataArguments
from .feature_blocks import Provenance, list_depth

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "class", "target")
# Row numbers as pandas writes them: without a name, or under one that it invents.
_UNNAMED = re.compile(r"\s*|Unnamed: \d+(\.\d+|_level_\d+)?|__index_level_\d+__")
_HINT = "Choose columns with --feature_column_names"


def label_columns(names: Iterable[str], label: str | None = None) -> list[str]:
    """Return the columns of labels: `label`, or else label, labels, class and target in any case."""
    if label is not None:
        return [name for name in names if name == label]
    found = [name for name in names if name.lower() in LABEL_COLUMNS]
    return sorted(found, key=lambda name: LABEL_COLUMNS.index(name.lower()))


def is_unnamed(name: str) -> bool:
    """Return whether it is the name of a column without a name, which pandas writes for row numbers."""
    return _UNNAMED.fullmatch(name) is not None


def abbreviate(names: Sequence[str]) -> str:
    """Join names with commas; of many, the first three and the last."""
    return ", ".join(names if len(names) <= 6 else (*names[:3], "...", names[-1]))


def choose_columns(
    types: dict[str, pa.DataType],
    name: str,
    args: DataArguments,
    expected: Sequence[str] = (),
    index_columns: Sequence[str] = (),
) -> tuple[Provenance, str]:
    """Choose the columns to read, and describe in a message which ones are read and which left out.

    The user's `feature_column_names` come first, then the `expected` columns of a trained encoder or of earlier
    data, in their order, else all columns of numbers except labels, row numbers and `index_columns`.

    Raises:
        UsageError: A column is missing or holds no numbers, or lists are combined with other columns.
    """
    depths = {column: depth for column, kind in types.items() if (depth := list_depth(kind)) is not None}
    left_out: dict[str, str] = {}
    if args.feature_column_names is not None:
        columns = _named_columns(types, depths, name, args.feature_column_names, expected)
    elif expected:
        columns = list(expected)
        missing = [column for column in expected if column not in types]
        if missing:
            raise UsageError(
                f"No column '{missing[0]}' in {name}, which lacks {len(missing)} of the {len(expected)} columns of the "
                f"training data ({abbreviate(expected)}). Add them, or rename its columns: {abbreviate(list(types))}."
            )
        _require_numbers(columns, types, depths, name)
        others = dict.fromkeys(depths, "not a feature of the training data")
        left_out = others | _reasons(types, args.label_column_name, index_columns)
    else:
        label = args.label_column_name
        if label not in (None, *types):
            raise UsageError(f"No column '{label}' in {name}. Correct --label_column_name, out of: {', '.join(types)}.")
        without_numbers = dict.fromkeys((column for column in types if column not in depths), "no numbers")
        left_out = without_numbers | _reasons(types, label, index_columns)
        columns = [column for column in depths if column not in left_out]
        if not columns:
            raise UsageError(f"No column of numbers in {name}. Its columns are: {', '.join(types)}.")
    lists = [column for column in columns if depths[column]]
    if lists and len(columns) > 1:
        other = next(column for column in columns if column != lists[0])
        raise UsageError(
            f"Column '{lists[0]}' of {name} holds lists and cannot be joined with column '{other}'. Choose it alone, "
            "or only columns of numbers, with --feature_column_names."
        )
    for column in columns:
        left_out.pop(column, None)
    reasons = [f"'{column}' ({reason})" for column, reason in left_out.items()]
    message = f"{len(columns)} feature column{'s' if len(columns) > 1 else ''}: {abbreviate(columns)}"
    message += f"; left out: {abbreviate(reasons)}" if reasons else ""
    return Provenance(name, tuple(columns), depths[columns[0]]), message


def _reasons(types: Iterable[str], label: str | None, index_columns: Sequence[str]) -> dict[str, str]:
    """Return the columns of labels and of row numbers, with the reason to leave them out."""
    row_numbers = {column: "row numbers" for column in types if is_unnamed(column) or column in index_columns}
    return row_numbers | dict.fromkeys(label_columns(types, label), "label")


def _named_columns(
    types: dict[str, pa.DataType], depths: dict[str, int], name: str, names: str, expected: Sequence[str]
) -> list[str]:
    """Return the columns that the user names; in the order of the expected ones, if those are columns of numbers."""
    # A name may contain a comma.
    columns = [names] if names in types else list(dict.fromkeys(map(str.strip, names.split(","))))
    _require_numbers(columns, types, depths, name)
    if len(expected) > 1 and not any(depths[column] for column in columns):
        missing = [column for column in expected if column not in columns]
        if missing:
            raise UsageError(
                f"--feature_column_names lacks the column '{missing[0]}' of the training data. Omit it, or name all "
                f"{len(expected)}: {abbreviate(expected)}."
            )
        return list(expected)
    return columns


def _require_numbers(columns: Sequence[str], types: dict[str, pa.DataType], depths: dict[str, int], name: str) -> None:
    for column in columns:
        if column not in types:
            raise UsageError(f"No column '{column}' in {name}. {_HINT}, out of: {', '.join(types)}.")
        if column not in depths:
            raise UsageError(f"Column '{column}' of {name} holds {types[column]}, not numbers. {_HINT}.")
