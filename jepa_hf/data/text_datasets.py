"""Text datasets from files, from the Hub, or from the reference prose that ships with Python."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, NamedSplit, Value

from ..errors import UsageError
from .arguments import DataArguments
from .dropped_rows import DroppedRows, reason_to_drop
from .file_readers import (
    SAMPLE_SIZE,
    file_errors_as_usage_error,
    file_format,
    find_files,
    json_type,
    open_parquet,
    read_rows,
    replace_lone_surrogates,
    single_kind,
)
from .splits import resolve_splits
from .text_columns import choose_text_column, csv_value_type, feature_type, not_text_error

_FEATURES = Features({"text": Value("string")})
# Lines from which a table in a .txt file is recognized.
_SNIFFED_LINES = 20


def load_text_datasets(
    args: DataArguments, *, seed: int, need_validation: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the texts to train and to evaluate on, without blank rows, in the one column `text`.

    Sources are those of `resolve_splits`; without any, training texts come from `builtin_corpus`.
    Files that are not streamed are read once as a check before anything is written to the cache.
    Rows without a text are counted by reason in one logged sentence, a warning if they are more than
    half; of streams the count so far and at the end of a pass. Lone surrogates, which JSON can express, become U+FFFD.

    Args:
        args: Sources and limits. `streaming` returns iterable instead of map-style datasets.
        seed: Seed of the held-out texts, not negative.
        need_validation: False ignores all validation sources.

    Returns:
        The training and the validation dataset; None for the latter unless `need_validation`.

    Raises:
        UsageError: Files, columns, names or splits do not exist, cannot be read, or hold no text. Of a streamed file
            only the part before its first text is checked here, the rest during reading.
    """

    def load_embedded() -> Dataset | IterableDataset:
        dataset = Dataset.from_dict({"text": builtin_corpus()})
        return dataset.to_iterable_dataset() if args.streaming else dataset

    return resolve_splits(
        args,
        seed=seed,
        need_validation=need_validation,
        load_files=partial(_load_files, args=args),
        load_split=partial(_load_split, args=args),
        load_default=load_embedded,
        streaming=args.streaming,
    )


def builtin_corpus() -> list[str]:
    """Return about 260 KB of English: the paragraphs of Python's language reference.

    Whitespace is normalized. Headings, grammar, code, paragraphs shorter than 40 characters and repetitions are
    omitted. The texts are the same in every call, but differ slightly between Python versions.
    """
    paragraphs = (" ".join(part.split()) for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
    return [
        paragraph
        for paragraph in dict.fromkeys(paragraphs)
        if len(paragraph) >= 40
        # Prose ends with a full stop, or with the colon that introduces an example.
        and paragraph.endswith((".", ":", "!", "?"))
        and not paragraph.endswith("...")
        and ">>>" not in paragraph
        and "::=" not in paragraph
    ]


@dataclass(frozen=True)
class _TextFile:
    """A file and its text column. `version` changes with the file and so invalidates the cache."""

    path: str
    kind: str
    column: str
    version: tuple[str, int, int]


def _load_files(argument: str, args: DataArguments) -> Dataset | IterableDataset:
    """Load the texts of the files that the argument of this name lists."""
    files = getattr(args, argument)
    paths = find_files(argument, files)
    kind = single_kind(argument, files, map(file_format, paths))
    text_files = [_open_text_file(argument, path, kind, args.text_column_name) for path in paths]
    source = f"{argument} '{files}'"
    # Reading all rows also raises their errors.
    dropped = DroppedRows(source)
    for _, reason in _read_cells(text_files):
        dropped.add(reason)
        if args.streaming and dropped.kept:
            break
    if not dropped.kept:
        raise UsageError(f"{source} holds no text, only blank rows. Provide a file with text.")
    settings: dict[str, Any] = {
        "gen_kwargs": {"files": text_files},
        "split": NamedSplit(argument.removesuffix("_file")),
    }
    if args.streaming:
        settings["gen_kwargs"]["source"] = source
        return IterableDataset.from_generator(_read_texts, features=_FEATURES, **settings)
    dropped.log()
    return Dataset.from_generator(_read_texts, cache_dir=args.cache_dir, **settings)


def _open_text_file(argument: str, path: str, kind: str, text_column_name: str | None) -> _TextFile:
    status = os.stat(path)
    if status.st_size == 0:
        raise UsageError(f"{argument} '{path}' is empty. Provide a file with text.")
    if kind == "text":
        with file_errors_as_usage_error(path):
            _check_plain_text(path)
    column = text_column(path, kind, text_column_name)
    return _TextFile(path, kind, column, (os.path.abspath(path), status.st_size, status.st_mtime_ns))


def _check_plain_text(path: str) -> None:
    """Refuse a table under the name of a text file, because its labels would be read as text."""
    lines = [row["text"].strip() for row in islice(read_rows(path, "text"), _SNIFFED_LINES)]
    lines = [line for line in lines if line]
    if lines and all(map(_is_json_object, lines)):
        raise UsageError(f"'{path}' holds JSON objects, whose labels would be read as text. Rename it to .jsonl.")
    tabs = {line.count("\t") for line in lines}
    if len(lines) > 1 and len(tabs) == 1 and tabs != {0}:
        raise UsageError(
            f"The lines of '{path}' have {tabs.pop() + 1} columns between tabs, all of which would be read as text. "
            "Rename it to .tsv with a header, or remove the tabs."
        )


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def text_column(path: str, kind: str, wanted: str | None) -> str:
    """Return the text column of a file, see `choose_text_column`."""
    with file_errors_as_usage_error(path):
        return choose_text_column(_column_types(path, kind), wanted, f"'{path}'", read_rows(path, kind))


def _column_types(path: str, kind: str) -> dict[str, str]:
    """Return the type of each column by name; outside Parquet inferred from the first rows."""
    if kind == "text":
        return {"text": "string"}
    if kind == "parquet":
        with open_parquet(path) as parquet:
            # Categories are texts, if their names are.
            return {
                column.name: str(column.type.value_type if pa.types.is_dictionary(column.type) else column.type)
                for column in parquet.schema_arrow
            }
    type_of = csv_value_type if kind in ("csv", "tsv") else json_type
    types: dict[str, str] = {}
    for row in islice(read_rows(path, kind), SAMPLE_SIZE):
        for name, value in row.items():
            # One string makes a column of strings: in CSV the other values only look like numbers.
            if types.get(name, "null") != "string":
                types[name] = types.get(name, "null") if value in (None, "") else type_of(value)
    if not types:
        raise UsageError(f"'{path}' has no rows. Provide a file with text.")
    return types


def _read_cells(files: list[_TextFile]) -> Iterator[tuple[str | None, str | None]]:
    """Yield the text of each row of all files, and the reason to drop it, if any."""
    for file in files:
        with file_errors_as_usage_error(file.path):
            for number, row in enumerate(read_rows(file.path, file.kind, file.column), 1):
                text = row.get(file.column)
                if text is not None and not isinstance(text, str):
                    raise not_text_error(f"Row {number} of '{file.path}'", file.column, text)
                yield text, reason_to_drop(text) if file.column in row else f"without '{file.column}'"


def _read_texts(files: list[_TextFile], source: str | None = None) -> Iterator[dict[str, str]]:
    """Yield the texts of all files, without rows to drop; log these of a stream, whose `source` is its name."""
    dropped = DroppedRows(source or "", running=True)
    for text, reason in _read_cells(files):
        if source is not None:
            dropped.add(reason)
        if text is not None and reason is None:
            yield {"text": replace_lone_surrogates(text)}
    dropped.log()


def _load_split(dataset: Dataset | IterableDataset, split: str, args: DataArguments) -> Dataset | IterableDataset:
    """Load the texts of a split of `args.dataset_name`."""
    source = f"dataset '{args.dataset_name}'"
    if dataset.features is None:
        types = {name: json_type(value) for name, value in next(iter(dataset), {}).items()}
    else:
        types = {name: feature_type(kind) for name, kind in dataset.features.items()}
    column = choose_text_column(types, args.text_column_name, source, dataset)
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    dropped = DroppedRows(f"split '{split}' of {source}", running=isinstance(dataset, IterableDataset))
    if isinstance(dataset, IterableDataset):
        # Streams lose their features in `filter`.
        return dataset.filter(partial(_count_and_filter, dropped=dropped), with_indices=True, batched=True).cast(
            _FEATURES
        )
    dropped.add_texts(dataset, "text")
    dropped.log()
    dataset = dataset.filter(
        _has_text, batched=True, load_from_cache_file=not args.overwrite_cache, desc="Dropping blank rows"
    )
    if len(dataset) == 0:
        raise UsageError(f"Split '{split}' of {source} holds no text in column '{column}'. Name another split.")
    return dataset


def _has_text(batch: dict[str, list[str | None]]) -> list[bool]:
    return [reason_to_drop(text) is None for text in batch["text"]]


def _count_and_filter(batch: dict[str, list[str | None]], indices: list[int], *, dropped: DroppedRows) -> list[bool]:
    if indices[0] == 0:
        dropped.restart()
    for text in batch["text"]:
        dropped.add(reason_to_drop(text))
    return _has_text(batch)
