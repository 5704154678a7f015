"""Readers of text, JSON, CSV and Parquet files, plain or gzipped."""

import csv
import gzip
import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from glob import glob
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError
from ..utils.counts import counted

logger = logging.getLogger(__name__)

TABLE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
ROW_FORMATS = {".txt": "text", ".text": "text", ".md": "text", **TABLE_FORMATS}
# Rows from which the types of columns are inferred.
SAMPLE_SIZE = 1000
DELIMITERS = {"csv": ",", "tsv": "\t"}
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}


def find_files(argument: str, files: str) -> list[str]:
    """Return the paths that a path, a glob, or several of them separated by commas match, those of a glob sorted.

    Raises:
        UsageError: A path does not exist or is a directory, or a glob matches no file.
    """
    paths: dict[str, None] = {}
    for pattern, matches in match_files(files):
        if os.path.isdir(pattern):
            raise UsageError(f"{argument} '{pattern}' is a directory. Name its files, such as '{pattern}/*.txt'.")
        if not matches:
            problem = "matches no file" if any(magic in pattern for magic in "*?[") else "does not exist"
            raise UsageError(f"{argument} '{pattern}' {problem}. Check the path.")
        paths |= dict.fromkeys(matches)
    return list(paths)


def split_paths(files: str) -> list[str]:
    """Return the paths and globs of a list with commas; a path that exists is taken literally."""
    return [files] if os.path.exists(files) else list(map(str.strip, files.split(",")))


def match_files(files: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each path or glob of a list with commas, and the files that it matches, sorted."""
    for pattern in split_paths(files):
        candidates = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
        yield pattern, [path for path in candidates if not os.path.isdir(path)]


def file_format(path: str, formats: Mapping[str, str] = ROW_FORMATS) -> str:
    """Return the kind of a file, a value of `formats`, from its suffix.

    Raises:
        UsageError: The suffix is unknown.
    """
    suffix = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if suffix not in formats:
        raise UsageError(
            f"'{path}' has the unknown suffix '{suffix}'. Use one of {', '.join(formats)}, optionally followed by .gz."
        )
    return formats[suffix]


def single_kind(argument: str, files: str, kinds: Iterable[str]) -> str:
    """Return the one kind of all files, or raise a `UsageError` if they differ."""
    different = sorted(set(kinds))
    if len(different) > 1:
        raise UsageError(f"{argument} '{files}' mixes {' and '.join(different)} files. Provide files of one kind.")
    return different[0]


def json_type(value: Any) -> str:
    """Return the name of a value's type, with "string" for str."""
    return "string" if isinstance(value, str) else type(value).__name__


def read_rows(path: str, kind: str, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; with `column`, rows of Parquet files hold only this column."""
    match kind:
        case "text":
            return _read_lines(path)
        case "json":
            return _read_json(path)
        case "parquet":
            return _read_parquet(path, column)
        case "csv" | "tsv":
            return _read_csv(path, kind)
        case _:
            raise ValueError(f"No reader of rows for the kind {kind!r}.")


def _read_lines(path: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for line in file:
            yield {"text": line.rstrip("\n")}


def _read_json(path: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON Lines, or of one JSON array, which is read into memory."""
    with open_text(path) as file:
        is_array = next(filter(str.strip, file), "").lstrip().startswith("[")
        file.seek(0)
        for number, document in [(1, file.read())] if is_array else enumerate(file, 1):
            if not document.strip():
                continue
            place = f"'{path}'" if is_array else f"Line {number} of '{path}'"
            try:
                rows = _JSON.decode(document.rstrip())
            except json.JSONDecodeError as error:
                line = number + error.lineno - 1
                raise UsageError(
                    f"Line {line}, column {error.colno}, of '{path}' is not valid JSON: {error.msg}. Write one object "
                    "per line, or one array of objects."
                ) from None
            except (ValueError, RecursionError) as error:  # a repeated key, a huge number, a deep nesting
                raise UsageError(f"{place} cannot be read as JSON: {error}.") from None
            for item, row in enumerate(rows if is_array else [rows], 1):
                if not isinstance(row, dict):
                    place = f"Item {item} of {place}" if is_array else place
                    raise UsageError(f"{place} has {json_type(row)} where an object is expected.")
                yield row


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"an object has the key {_repeated(name for name, _ in pairs)!r} twice")
    return row


# Built once, because `json.loads` with a hook builds one for each line.
_JSON = json.JSONDecoder(object_pairs_hook=_json_object)


def _repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs twice; columns without a name do not count."""
    return next((name for name, count in Counter(names).items() if count > 1 and name.strip()), None)


def _check_column_names(names: Iterable[str], path: str) -> None:
    repeated = _repeated(names)
    if repeated is not None:
        raise UsageError(f"'{path}' has several columns '{repeated}'. Rename all but one.")


def _read_csv(path: str, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with a header, and skip blank lines."""
    header, rows = csv_table(path, kind)
    for line, row in rows:
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        elif "".join(row).strip():
            raise csv_width_error(f"Line {line} of '{path}'", row, header)


def csv_width_error(place: str, row: Sequence[str], header: Sequence[str]) -> UsageError:
    """Return the error for a row with another number of values than the header."""
    return UsageError(
        f"{place} has {counted(len(row), 'value')} for {counted(len(header), 'column')}. Put double quotes around "
        "values that hold the separator."
    )


def csv_table(path: str, kind: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header of a table, and its rows that are not empty, each with the number of its first line.

    Columns are separated by a comma (kind "csv") or a tab ("tsv"). If the header has another separator instead
    (comma, semicolon, tab or vertical bar), that one is used and logged.

    Raises:
        UsageError: The file is not valid CSV, its separator is ambiguous, or columns have the same name.
    """
    lines = _csv_lines(path, csv_separator(path, DELIMITERS[kind]))
    header = next((cells for _, cells in lines if "".join(cells).strip()), [])
    _check_column_names(header, path)
    return header, ((line, cells) for line, cells in lines if cells)


def _csv_lines(path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows, each with the number of its first line."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    remedy = "Double the quotes inside values, or write the rows as .jsonl."
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        first = 1
        try:
            for cells in reader:
                # Quotes of a value may pair with those of a later line, and swallow what is between.
                if separator == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                    raise UsageError(
                        f"The row in lines {first} to {reader.line_num} of '{path}' has a value that starts with a "
                        f"quote and holds tabs and line ends. {remedy}"
                    )
                yield first, cells
                first = reader.line_num + 1
        except csv.Error as error:
            last = reader.line_num
            place = f"Line {last}" if first == last else f"The row in lines {first} to {last}"
            reason = str(error).replace("unexpected end of data", "a quote is not closed")
            raise UsageError(f"{place} of '{path}' is not valid CSV: {reason}. {remedy}") from None


def csv_separator(path: str, expected: str) -> str:
    """Return the separator of a table: the expected one, or the only other one in its header.

    Raises:
        UsageError: The header has several others.
    """
    with open_text(path, newline="") as file:
        header = next(filter(str.strip, file), "")
    names = re.sub('"[^"]*"', "", header)  # quoted names may hold any character
    separators = [separator for separator in _SEPARATORS if separator in names]
    if expected in separators or not separators:
        return expected
    if len(separators) > 1:
        raise UsageError(
            f"The header of '{path}' has no {_SEPARATORS[expected]}, but several other separators. Separate the "
            f"columns by a {_SEPARATORS[expected]}."
        )
    log_once(
        f"the columns of '{path}' are separated by a {_SEPARATORS[separators[0]]}, not by a {_SEPARATORS[expected]}"
    )
    return separators[0]


@cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Log a message once in a process, because files are read several times and streams in each pass."""
    logger.log(level, message)


def _read_parquet(path: str, column: str | None) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(SAMPLE_SIZE, columns=column and [column]):
            yield from batch.to_pylist()


def is_gzip(path: str) -> bool:
    """Return whether a file is gzipped, from its suffix."""
    return path.lower().endswith(".gz")


def open_text(path: str, newline: str | None = None) -> IO[str]:
    """Open a plain or gzipped UTF-8 file and skip its byte order mark."""
    opener = gzip.open if is_gzip(path) else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def open_bytes(path: str) -> IO[bytes]:
    """Open a plain or gzipped file as (unpacked) bytes."""
    return cast(IO[bytes], gzip.open(path)) if is_gzip(path) else open(path, "rb")


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a plain or gzipped Parquet file; Arrow's errors inside become a `UsageError`."""
    try:
        with open_bytes(path) as file, tempfile.TemporaryFile() as unpacked:
            if is_gzip(path):
                # Parquet is read from its end, which gzip cannot seek to.
                shutil.copyfileobj(file, unpacked)
                file = unpacked
            with pq.ParquetFile(file) as parquet:
                _check_column_names(parquet.schema_arrow.names, path)
                yield parquet
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"'{path}' is not a valid Parquet file: {reason}.") from None


@contextmanager
def file_errors_as_usage_error(path: str) -> Iterator[None]:
    """Turn errors of reading the file at `path` into a `UsageError` that names it."""
    try:
        try:
            yield
        except ValueError:  # a UsageError too
            if is_gzip(path):
                # Read to the end: gzip may detect damage only there, after it has unpacked invalid data.
                with open_bytes(path) as file:
                    while file.read(2**20):
                        pass
            raise
    except UnicodeDecodeError:
        raise UsageError(
            f"'{path}' is not UTF-8 at byte {_first_invalid_utf8_offset(path)}. Convert it to UTF-8."
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"'{path}' is not a complete gzip file: {error}.") from None
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UsageError(f"'{path}' cannot be read: {reason}. Restore it, or name another file.") from None


def _first_invalid_utf8_offset(path: str) -> int:
    """Return the offset, in the unpacked file, of the first byte that is not UTF-8."""
    offset = 0
    with open_bytes(path) as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    return offset


def replace_lone_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
