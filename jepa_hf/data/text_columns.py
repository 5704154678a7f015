"""Choice of the column of a table that holds the texts."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Value

from ..errors import UsageError
from .file_readers import json_type, log_once

_STRING_TYPES = ("string", "large_string", "string_view")
# A longer name of a column is probably a text, in a table without a header.
_MAX_NAME_WORDS, _MAX_NAME_CHARS = 5, 50


def feature_type(feature: Any) -> str:
    """Return the name of the type of a feature of `datasets`."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def choose_text_column(
    types: dict[str, str], wanted: str | None, source: str, rows: Iterable[Mapping[str, Any]]
) -> str:
    """Return the column to read: the `wanted` one, else `text`, else the only one of strings.

    `types` has the type of each column; the first of the `rows` is read for an error.

    Raises:
        UsageError: There is no such column, or it holds no strings.
    """
    strings = [name for name, kind in types.items() if kind in _STRING_TYPES]
    if wanted is None and "text" not in types and len(strings) == 1:
        _check_header(strings[0], list(types), source)
        log_once(f"the texts of {source} are read from the column '{strings[0]}'")
        return strings[0]
    name = wanted or "text"
    if name not in types:
        raise UsageError(
            f"No column '{name}' in {source}. Set --text_column_name to the column with the text, out of: "
            f"{', '.join(types)}."
        )
    check_text_type(types, name, source, rows)
    return name


def check_text_type(types: dict[str, str], name: str, source: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a column of another type than strings, with its first value and the columns of strings."""
    if types[name] in (*_STRING_TYPES, "null"):
        return
    strings = ", ".join(other for other, kind in types.items() if kind in _STRING_TYPES)
    value = f"{next(iter(rows), {}).get(name)!r:.40}"
    remedy = (
        f"Name one of the columns of strings with --text_column_name: {strings}"
        if strings
        else "No column holds strings, so convert the texts"
    )
    raise UsageError(
        f"Column '{name}' of {source} holds {types[name]}, not strings; its first row has {value}. {remedy}."
    )


def not_text_error(place: str, column: str, value: Any) -> UsageError:
    """Return the error for a value that is not a string in a column of texts."""
    return UsageError(
        f"{place} has {json_type(value)} ({value!r:.40}) in column '{column}', which must hold strings. Convert it to "
        "a string, or remove the row."
    )


def csv_value_type(value: str) -> str:
    """Return the name of the type that a value of a CSV file looks like: int, float or string."""
    for kind in (int, float):
        try:
            kind(value)
        except ValueError:
            continue
        return kind.__name__
    return "string"


def _check_header(chosen: str, names: list[str], source: str) -> None:
    """Refuse a first row that is probably no header: a text, numbers, or several columns in one."""
    numbers = [name for name in names if name.strip() and csv_value_type(name) != "string"]
    is_numbered = numbers == [str(number) for number in range(len(numbers))]  # as pandas names columns
    has_separator = any(separator in chosen for separator in ";\t|")
    is_long = len(chosen.split()) > _MAX_NAME_WORDS or len(chosen) > _MAX_NAME_CHARS
    if has_separator or is_long or chosen.endswith((".", "!", "?", "。", "！", "？")) or not is_numbered:
        raise UsageError(
            f"The column names of {source} look like a row of data: {', '.join(map(repr, names))}. Add a header line "
            "with short names, or set --text_column_name to the column with the text if these are names."
        )
