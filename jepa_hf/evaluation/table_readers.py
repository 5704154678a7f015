"""Reading of tables in parts with equal columns: of Parquet files with their types, of others inferred."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from ..data.file_readers import file_errors_as_usage_error, open_parquet, read_rows, replace_lone_surrogates
from ..data.text_columns import not_text_error
from ..errors import UsageError

EMBEDDING_COLUMN = "embedding"


@dataclass(frozen=True)
class Tables:
    """Rows of files, and a function that reads them as tables with their numbers of rows.

    A table without columns has no number of its own.
    """

    count: int
    read: Callable[[], Iterator[tuple[pa.Table, int]]]


def open_tables(
    paths: Sequence[str], kind: str, size: int, text_column: str | None = None, exclude: Sequence[str] = ()
) -> Tables:
    """Open files of one kind as tables of at most `size` rows, without the columns `exclude`.

    Raises:
        UsageError: Files cannot be read or differ in their columns, a value of `text_column` is neither
            a string nor null, or a column has the name of the embeddings.
    """
    if kind == "parquet":
        names, tables = _open_parquet_files(paths, size, exclude)
    else:
        names, tables = _open_rows(paths, kind, size, text_column, exclude)
    if EMBEDDING_COLUMN in names:
        raise UsageError(f"'{paths[0]}' has a column '{EMBEDDING_COLUMN}' already. Rename it.")
    return tables


def _open_parquet_files(paths: Sequence[str], size: int, exclude: Sequence[str]) -> tuple[list[str], Tables]:
    """Open Parquet files with equal columns, whose types are kept."""
    count = 0
    schemas: list[pa.Schema] = []
    for path in paths:
        with file_errors_as_usage_error(path), open_parquet(path) as parquet:
            count += parquet.metadata.num_rows
            fields = [field for field in parquet.schema_arrow if field.name not in exclude]
            schemas.append(pa.schema(fields))
    names = schemas[0].names
    if len({frozenset(schema) for schema in schemas}) > 1:
        raise UsageError(f"'{paths[0]}' and the other files differ in their columns. Give files with the same ones.")

    def read() -> Iterator[tuple[pa.Table, int]]:
        for path in paths:
            with file_errors_as_usage_error(path), open_parquet(path) as parquet:
                for batch in parquet.iter_batches(size, columns=names):
                    yield pa.Table.from_batches([batch]).select(names).cast(schemas[0]), batch.num_rows

    return names, Tables(count, read)


def _open_rows(
    paths: Sequence[str], kind: str, size: int, text_column: str | None, exclude: Sequence[str]
) -> tuple[list[str], Tables]:
    """Open other files. They are read once to check the texts and to infer the columns' types."""
    values: dict[str, set[type]] = {}
    count = 0
    for path in paths:
        for number, row in enumerate(_rows([path], kind, text_column), 1):
            count += 1
            if text_column is not None and not isinstance(row.get(text_column), str | None):
                raise not_text_error(f"Row {number} of '{path}'", text_column, row[text_column])
            for name, value in row.items():
                # An integer beyond 64 bits has no type in Arrow.
                is_huge = type(value) is int and not -(2**63) <= value < 2**63
                values.setdefault(name, set()).add(object if is_huge else type(value))
    types = {name: _arrow_type(found) for name, found in values.items() if name not in exclude}

    def read() -> Iterator[tuple[pa.Table, int]]:
        rows = _rows(paths, kind, text_column)
        while chunk := list(islice(rows, size)):
            columns = {
                replace_lone_surrogates(name): pa.array([_coerce(row.get(name), to) for row in chunk], to)
                for name, to in types.items()
            }
            yield pa.table(columns), len(chunk)

    return list(types), Tables(count, read)


def _rows(paths: Sequence[str], kind: str, text_column: str | None) -> Iterator[dict[str, Any]]:
    for path in paths:
        with file_errors_as_usage_error(path):
            # An empty line is an empty text, but no row of numbers.
            yield from (row for row in read_rows(path, kind) if row or text_column is not None)


def _arrow_type(found: set[type]) -> pa.DataType:
    """Return the type of a column with values of these types; mixed and nested ones become JSON strings."""
    match sorted(kind.__name__ for kind in found - {type(None)}):
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
