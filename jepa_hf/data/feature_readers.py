"""Readers of feature files as blocks of float32 numbers, by the files' suffixes."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ..errors import UsageError
from .arguments import DataArguments
from .feature_arrays import array_blocks, load_npy, load_npz
from .feature_blocks import BATCH_ROWS, Block, Provenance, column_blocks
from .feature_columns import choose_columns
from .feature_csv import csv_blocks, csv_column_types
from .feature_json import json_batches, json_column_types
from .file_readers import is_gzip, open_parquet

_FORMAT_BY_SUFFIX = {
    ".npy": "npy",
    ".npz": "npz",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
}


@dataclass(frozen=True)
class FeatureFile:
    """A file of features, opened.

    Attributes:
        source: The file and the columns that are read.
        blocks: The rows, read lazily.
        message: The columns that are read and left out; empty for an array.
    """

    source: Provenance
    blocks: Iterator[Block]
    message: str = ""


def array_format(path: str) -> str:
    """Return the kind of a feature file, a value of `_FORMAT_BY_SUFFIX`, from its suffix.

    Raises:
        UsageError: The suffix is unknown.
    """
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if suffix not in _FORMAT_BY_SUFFIX or (is_gzip(path) and suffix in (".npy", ".npz")):
        raise UsageError(
            f"'{path}' has an unknown suffix for features. Use one of {', '.join(_FORMAT_BY_SUFFIX)}, all but the "
            "first two optionally followed by .gz."
        )
    return _FORMAT_BY_SUFFIX[suffix]


def open_feature_file(path: str, kind: str, args: DataArguments, expected: Sequence[str] = ()) -> FeatureFile:
    """Open a file of features.

    Args:
        path: Of the file.
        kind: See `array_format`.
        args: Names of columns.
        expected: See `choose_columns`.
    """
    if kind in ("npy", "npz"):
        array, lengths = load_npy(path, args) if kind == "npy" else load_npz(path, args)
        source = Provenance(f"'{path}'")
        return FeatureFile(source, array_blocks(array, lengths, source))
    types, index_columns = _column_types(path, kind)
    source, message = choose_columns(types, f"'{path}'", args, expected, index_columns)
    match kind:
        case "parquet":
            blocks = column_blocks(_parquet_batches(path, source), source)
        case "json":
            blocks = column_blocks(json_batches(path, source), source)
        case _:
            blocks = csv_blocks(path, kind, source)
    return FeatureFile(source, blocks, message)


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
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"'{path}' has several columns named '{duplicate}'. Give each a name of its own.")
    return dict(zip(names, types, strict=True)), index_columns


def _parquet_batches(path: str, source: Provenance) -> Iterator[list[pa.Array]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=list(source.columns)):
            yield batch.select(source.columns).columns
