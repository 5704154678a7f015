"""Readers of feature files as blocks of float32 numbers, by the files' suffixes."""

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa

from ..errors import UsageError
from .arguments import DataArguments
from .feature_arrays import array_blocks, load_npy, load_npz
from .feature_blocks import BATCH_ROWS, Block, Provenance, column_blocks
from .feature_columns import choose_columns
from .feature_csv import csv_blocks, csv_column_types
from .feature_json import json_batches, json_column_types
from .file_readers import TABLE_FORMATS, file_format, is_gzip, open_parquet

ARRAY_FORMATS = {".npy": "npy", ".npz": "npz"}


def is_array_file(path: str) -> bool:
    """Return whether a file's suffix, in any case, is one of an array."""
    return path.lower().endswith(tuple(ARRAY_FORMATS))


def array_format(path: str) -> str:
    """Return the kind of a feature file, from its suffix, or raise a `UsageError`."""
    return file_format(path, ARRAY_FORMATS | TABLE_FORMATS)


def open_feature_file(
    path: str, kind: str, args: DataArguments, expected: Sequence[str] = ()
) -> tuple[Provenance, Iterator[Block], str]:
    """Open a file of the kind `array_format`; see `choose_columns` for the `expected` columns.

    Returns:
        The file with the columns that are read; its rows, read lazily; and a message about columns that are read
        and left out, empty for an array.
    """
    if kind in ARRAY_FORMATS.values():
        if is_gzip(path):
            raise UsageError(f"'{path}' is a gzipped array. Unpack it.")
        array, lengths = load_npy(path, args) if kind == "npy" else load_npz(path, args)
        source = Provenance(f"'{path}'")
        return source, array_blocks(array, lengths, source), ""
    types, index_columns = _column_types(path, kind)
    source, message = choose_columns(types, f"'{path}'", args, expected, index_columns)
    match kind:
        case "parquet":
            blocks = column_blocks(_parquet_batches(path, source), source)
        case "json":
            blocks = column_blocks(json_batches(path, source), source)
        case "csv" | "tsv":
            blocks = csv_blocks(path, kind, source)
        case _:
            raise ValueError(f"No reader of features for the kind {kind!r}.")
    return source, blocks, message


def _column_types(path: str, kind: str) -> tuple[dict[str, pa.DataType], list[str]]:
    """Return the type of each column by name, and the columns that pandas wrote as its index."""
    index_columns: list[str] = []
    if kind == "parquet":
        with open_parquet(path) as parquet:
            schema = parquet.schema_arrow
        names, types = schema.names, schema.types
        if b"pandas" in (schema.metadata or {}):
            index_columns = json.loads(schema.metadata[b"pandas"]).get("index_columns", [])
    else:
        names, types = json_column_types(path) if kind == "json" else csv_column_types(path, kind)
    if not names:
        raise UsageError(f"No rows in '{path}'. Provide data with at least one.")
    return dict(zip(names, types, strict=True)), index_columns


def _parquet_batches(path: str, source: Provenance) -> Iterator[list[pa.Array]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=list(source.columns)):
            yield batch.select(source.columns).columns
