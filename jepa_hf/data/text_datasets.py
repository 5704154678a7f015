"""Text datasets from files, from the Hub, or from the reference prose that ships with Python."""

import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value

from ..errors import UsageError
from .arguments import DataArguments
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

_STRING_TYPES = ("string", "large_string", "string_view")
_FEATURES = Features({"text": Value("string")})


def load_text_datasets(
    args: DataArguments, *, seed: int, need_validation: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the texts to train and to evaluate on, without blank rows, in the one column `text`.

    Sources are those of `resolve_splits`; without any, training texts come from `builtin_corpus`.
    Files that are not streamed are read once as a check before anything is written to the cache.
    Null texts count as blank. Lone surrogates, which JSON can express, become U+FFFD.

    Args:
        args: Sources and limits. `streaming` returns iterable instead of map-style datasets.
        seed: Seed of the held-out texts, not negative.
        need_validation: False ignores all validation sources.

    Returns:
        The training and the validation dataset; None for the latter unless `need_validation`.

    Raises:
        UsageError: Files, columns, names or splits do not exist, cannot be read, or hold no text.
            Of a streamed file only the part before its first text is checked here, the rest during
            reading.
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

    Whitespace is normalized. Headings, grammar, code, paragraphs shorter than 40 characters and
    repetitions are omitted. The texts are the same in every call, but differ slightly between
    Python versions.
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
    texts = _read_texts(text_files)
    if next(texts, None) is None:
        raise UsageError(f"{argument} '{files}' holds no text, only blank rows. Provide a file with text.")
    settings: dict[str, Any] = {
        "gen_kwargs": {"files": text_files},
        "split": NamedSplit(argument.removesuffix("_file")),
    }
    if args.streaming:
        return IterableDataset.from_generator(_read_texts, features=_FEATURES, **settings)
    deque(texts, maxlen=0)  # reads the remaining rows, to raise their errors
    return Dataset.from_generator(_read_texts, cache_dir=args.cache_dir, **settings)


def _open_text_file(argument: str, path: str, kind: str, text_column_name: str | None) -> _TextFile:
    status = os.stat(path)
    if status.st_size == 0:
        raise UsageError(f"{argument} '{path}' is empty. Provide a file with text.")
    column = text_column(path, kind, text_column_name)
    return _TextFile(path, kind, column, (os.path.abspath(path), status.st_size, status.st_mtime_ns))


def text_column(path: str, kind: str, wanted: str | None) -> str:
    """Return the text column of a file: the `wanted` one, `text`, or the only one of strings.

    Raises:
        UsageError: There is no such column, or it holds no strings.
    """
    with file_errors_as_usage_error(path):
        return _choose_column(_column_types(path, kind), wanted, f"'{path}'")


def _choose_column(types: dict[str, str], wanted: str | None, source: str) -> str:
    """Return the column to read: the `wanted` one, else `text`, else the only one of strings.

    Args:
        types: The type of each column by name.
        wanted: Name from the user, if any.
        source: Description of the data for errors.
    """
    strings = [name for name, kind in types.items() if kind in _STRING_TYPES]
    if wanted is None and "text" not in types and len(strings) == 1:
        return strings[0]
    name = wanted or "text"
    if name not in types:
        raise UsageError(
            f"No column '{name}' in {source}. Set --text_column_name to the column with the text, out of: "
            f"{', '.join(types)}."
        )
    if types[name] not in (*_STRING_TYPES, "null"):
        raise UsageError(
            f"Column '{name}' of {source} holds {types[name]}, not strings. Set --text_column_name to the column with "
            f"the text, out of: {', '.join(types)}."
        )
    return name


def _column_types(path: str, kind: str) -> dict[str, str]:
    """Return the type of each column by name; outside Parquet inferred from the first rows."""
    if kind == "text":
        return {"text": "string"}
    if kind == "parquet":
        with open_parquet(path) as parquet:
            return {column.name: str(column.type) for column in parquet.schema_arrow}
    type_of = _csv_type if kind in ("csv", "tsv") else json_type
    types: dict[str, str] = {}
    for row in islice(read_rows(path, kind), SAMPLE_SIZE):
        for name, value in row.items():
            # One string makes a column of strings: in CSV the other values only look like numbers.
            if types.get(name, "null") != "string":
                types[name] = types.get(name, "null") if value in (None, "") else type_of(value)
    if not types:
        raise UsageError(f"'{path}' has no rows. Provide a file with text.")
    return types


def _csv_type(value: str) -> str:
    for kind in (int, float):
        try:
            kind(value)
        except ValueError:
            continue
        return kind.__name__
    return "string"


def _read_texts(files: list[_TextFile]) -> Iterator[dict[str, str]]:
    """Yield the texts of all files, without blank ones."""
    for file in files:
        with file_errors_as_usage_error(file.path):
            for number, row in enumerate(read_rows(file.path, file.kind, file.column), 1):
                text = row.get(file.column)
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise UsageError(
                        f"Row {number} of '{file.path}' has {type(text).__name__} in column '{file.column}', which "
                        "must hold strings."
                    )
                if text.strip():
                    yield {"text": replace_lone_surrogates(text)}


def _load_split(dataset: Dataset | IterableDataset, split: str, args: DataArguments) -> Dataset | IterableDataset:
    """Load the texts of a split of `args.dataset_name`."""
    source = f"dataset '{args.dataset_name}'"
    if dataset.features is None:
        types = {name: json_type(value) for name, value in next(iter(dataset), {}).items()}
    else:
        types = {
            name: kind.dtype if isinstance(kind, Value) else type(kind).__name__
            for name, kind in dataset.features.items()
        }
    column = _choose_column(types, args.text_column_name, source)
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    if isinstance(dataset, IterableDataset):
        # Streams lose their features in `filter`.
        return dataset.filter(_has_text, batched=True).cast(_FEATURES)
    dataset = dataset.filter(
        _has_text, batched=True, load_from_cache_file=not args.overwrite_cache, desc="Dropping blank rows"
    )
    if len(dataset) == 0:
        raise UsageError(f"Split '{split}' of {source} holds no text in column '{column}'. Name another split.")
    return dataset


def _has_text(batch: dict[str, list[str | None]]) -> list[bool]:
    return [text is not None and not text.isspace() and text != "" for text in batch["text"]]
