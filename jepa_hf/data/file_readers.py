"""Readers of text, JSON, CSV and Parquet files, plain or gzipped."""

import codecs
import csv
import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
SAMPLE_SIZE = 1000


def find_files(argument: str, files: str) -> list[str]:
    """The paths that a path, a glob, or several of them separated by commas stand for; globs sorted."""
    paths: dict[str, None] = {}
    for pattern in [files] if os.path.exists(files) else map(str.strip, files.split(",")):
        if os.path.isdir(pattern):
            raise UsageError(f"{argument} '{pattern}' is a directory; name its files, such as '{pattern}/*.txt'")
        if os.path.exists(pattern):
            found = [pattern]
        else:
            found = sorted(path for path in glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            problem = "matches no file" if any(magic in pattern for magic in "*?[") else "does not exist"
            raise UsageError(f"{argument} '{pattern}' {problem}; check the path")
        paths |= dict.fromkeys(found)
    return list(paths)


def file_kind(path: str) -> str:
    """The kind of file that an ending stands for."""
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if ending not in _KINDS:
        raise UsageError(
            f"'{path}' has the unknown ending '{ending}'; known are {', '.join(_KINDS)}, each also followed by .gz"
        )
    return _KINDS[ending]


def json_type(value: Any) -> str:
    return "string" if isinstance(value, str) else type(value).__name__


def read_rows(path: str, kind: str, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file. Rows of parquet files hold only `column`, if given."""
    match kind:
        case "text":
            return _read_lines(path)
        case "json":
            return _read_json(path)
        case "csv":
            return _read_csv(path, ",")
        case "tsv":
            return _read_csv(path, "\t")
        case _:
            return _read_parquet(path, column)


def _read_lines(path: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for line in file:
            yield {"text": line.rstrip("\n")}


def _read_json(path: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines or of one JSON array. The latter is read whole."""
    with open_text(path) as file:
        is_array = next(filter(str.strip, file), "").lstrip().startswith("[")
        file.seek(0)
        for number, document in [(1, file.read())] if is_array else enumerate(file, 1):
            if not document.strip():
                continue
            try:
                rows = json.loads(document.rstrip())
            except json.JSONDecodeError as error:
                line = number + error.lineno - 1
                raise UsageError(f"line {line} of '{path}' is not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:  # a huge number, a deep nesting
                raise UsageError(f"line {number} of '{path}' cannot be read as JSON: {error}") from None
            for row in rows if is_array else [rows]:
                if not isinstance(row, dict):
                    raise UsageError(f"line {number} of '{path}' has {json_type(row)} where an object is expected")
                yield row


def _read_csv(path: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if len(row) > len(header):
                    raise UsageError(
                        f"line {reader.line_num} of '{path}' has {len(row)} values for {len(header)} columns; put "
                        "double quotes around values that hold the separator"
                    )
                yield dict(zip(header, row, strict=False))
        except csv.Error as error:
            raise UsageError(f"line {reader.line_num} of '{path}' is not valid CSV: {error}") from None


def _read_parquet(path: str, column: str | None) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(SAMPLE_SIZE, columns=column and [column]):
            yield from batch.to_pylist()


def is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def open_text(path: str, newline: str | None = None) -> IO[str]:
    opener = gzip.open if is_gzip(path) else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def open_bytes(path: str) -> IO[bytes]:
    return gzip.open(path) if is_gzip(path) else open(path, "rb")


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with open_bytes(path) as file, tempfile.TemporaryFile() as unpacked:
            if is_gzip(path):
                # Parquet is read from its end, which gzip cannot find.
                shutil.copyfileobj(file, unpacked)
                file = unpacked
            with pq.ParquetFile(file) as parquet:
                yield parquet
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"'{path}' is not a valid Parquet file: {reason}") from None


@contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Make what can go wrong while reading the file at `path` a `UsageError` that names it."""
    try:
        try:
            yield
        except ValueError:  # a UsageError too
            if is_gzip(path):
                # Damage that gzip notices only at the end of the file first unpacks to nonsense.
                with open_bytes(path) as file:
                    while file.read(2**20):
                        pass
            raise
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' is not UTF-8 at byte {_first_bad_byte(path)}; convert it to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"'{path}' is not a whole gzip file: {error}") from None
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UsageError(f"'{path}' cannot be read: {reason}; restore it, or name another file") from None


def _first_bad_byte(path: str) -> int:
    """The offset of the first byte that is not UTF-8, counted in the unpacked file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_bytes(path) as file:
        while True:
            chunk = file.read(2**20)
            begun = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return offset - begun + error.start
            offset += len(chunk)


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which UTF-8 has no bytes for, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
