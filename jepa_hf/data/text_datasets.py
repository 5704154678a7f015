"""Where text comes from: files, a dataset on the Hub, or the reference prose that ships with Python."""

import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value

from ..errors import UsageError
from .arguments import DataArguments
from .file_readers import (
    SAMPLE_SIZE,
    file_kind,
    find_files,
    json_type,
    naming_file,
    open_parquet,
    read_rows,
    well_formed,
)
from .splits import first_samples, hold_out, load_named

_STRING_TYPES = ("string", "large_string", "string_view")
_FEATURES = Features({"text": Value("string")})


def load_text_datasets(
    args: DataArguments, *, seed: int, need_validation: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the texts to train and to evaluate on, each dataset with the one column `text` and no blank rows.

    Texts to train on come from `args.train_file` or `args.dataset_name`, without either from `embedded_corpus`. Texts
    to evaluate on come from `args.validation_file`, else from the validation split of `args.dataset_name`, else
    `args.validation_split_percentage` of the training texts (at least one, and not all) are set apart, the same ones
    for the same `seed`; the rest keeps its order.

    Files that are not streamed are read once as a check before anything is written to the cache. Null texts count as
    blank. Lone surrogates, which JSON can spell, become U+FFFD.

    Args:
        args: Their `streaming` decides whether datasets are map-style or iterable.
        seed: Not negative.
        need_validation: False leaves all validation sources alone.

    Returns:
        The training and the validation dataset; None for the latter unless `need_validation`.

    Raises:
        UsageError: For all that can be wrong with what the user gave: files, columns, names, splits. Of a streamed
            file only what comes before its first text is looked at here, the rest when it is read.
    """
    if args.dataset_name is not None and args.train_file is not None:
        raise UsageError("dataset_name and train_file exclude each other; give only one of them")
    splits = {} if args.dataset_name is None else load_named(args)
    if args.dataset_name is not None:
        train = _pick_split(splits, args.dataset_train_split, args)
    elif args.train_file is not None:
        train = _load_files("train_file", args.train_file, args, "train")
    else:
        train = Dataset.from_dict({"text": embedded_corpus()})
        train = train.to_iterable_dataset() if args.streaming else train

    validation = None
    if need_validation:
        if args.validation_file is not None:
            validation = _load_files("validation_file", args.validation_file, args, "validation")
        elif splits and (args.dataset_validation_split or "validation" in splits):
            validation = _pick_split(splits, args.dataset_validation_split or "validation", args)
        elif args.streaming:
            raise UsageError("streamed texts cannot be split; give --validation_file to evaluate on")
        else:
            train, validation = hold_out(train, args.validation_split_percentage, seed)

    return first_samples(train, validation, args)


def embedded_corpus() -> list[str]:
    """About 260 KB of English: the paragraphs of Python's own language reference, as `help()` shows it.

    Whitespace is normalized; headings, grammar, code, paragraphs shorter than 40 characters and repetitions are left
    out. The texts are the same in every call but differ a little between Python versions.
    """
    paragraphs = (" ".join(part.split()) for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
    return [
        paragraph
        for paragraph in dict.fromkeys(paragraphs)
        if len(paragraph) >= 40
        # Prose ends like a sentence, or like one that introduces an example.
        and paragraph.endswith((".", ":", "!", "?"))
        and not paragraph.endswith("...")
        and ">>>" not in paragraph
        and "::=" not in paragraph
    ]


@dataclass(frozen=True)
class _TextFile:
    """A file and the column to read. `version` changes with the file, so that the cache tells its versions apart."""

    path: str
    kind: str
    column: str
    version: tuple[str, int, int]


def _load_files(argument: str, files: str, args: DataArguments, split: str) -> Dataset | IterableDataset:
    """The texts of `files`, the value of the argument named `argument`."""
    paths = find_files(argument, files)
    kinds = sorted({file_kind(path) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"{argument} '{files}' mixes {' and '.join(kinds)} files; give files of one kind")
    text_files = [_describe(argument, path, kinds[0], args.text_column_name) for path in paths]
    texts = _read_texts(text_files)
    if next(texts, None) is None:
        raise UsageError(f"{argument} '{files}' holds no text, only blank rows; give a file with text")
    reading: dict[str, Any] = {"gen_kwargs": {"files": text_files}, "split": NamedSplit(split)}
    if args.streaming:
        return IterableDataset.from_generator(_read_texts, features=_FEATURES, **reading)
    deque(texts, maxlen=0)  # reads all the rest, for its errors
    return Dataset.from_generator(_read_texts, cache_dir=args.cache_dir, **reading)


def _describe(argument: str, path: str, kind: str, text_column_name: str | None) -> _TextFile:
    status = os.stat(path)
    if status.st_size == 0:
        raise UsageError(f"{argument} '{path}' is empty; give a file with text")
    column = text_column(path, kind, text_column_name)
    return _TextFile(path, kind, column, (os.path.abspath(path), status.st_size, status.st_mtime_ns))


def text_column(path: str, kind: str, wanted: str | None) -> str:
    """The column of a file that holds its texts: the `wanted` one, else `text`, else the only one of strings."""
    with naming_file(path):
        return _choose_column(_column_types(path, kind), wanted, f"'{path}'")


def _choose_column(types: dict[str, str], wanted: str | None, source: str) -> str:
    """The column to read: the `wanted` one, else `text`, else the only one that holds strings.

    Args:
        types: The type of each column by its name.
        source: What has the columns, as an error is to call it.
    """
    strings = [name for name, kind in types.items() if kind in _STRING_TYPES]
    if wanted is None and "text" not in types and len(strings) == 1:
        return strings[0]
    name = wanted or "text"
    if name not in types:
        raise UsageError(
            f"{source} has no column '{name}'; name the column with the text by --text_column_name, out of: "
            f"{', '.join(types)}"
        )
    if types[name] not in (*_STRING_TYPES, "null"):
        raise UsageError(
            f"column '{name}' of {source} holds {types[name]}, not strings; name the column with the text by "
            f"--text_column_name, out of: {', '.join(types)}"
        )
    return name


def _column_types(path: str, kind: str) -> dict[str, str]:
    """The type of each column by its name, "string" for text, as far as the first rows show it."""
    if kind == "text":
        return {"text": "string"}
    if kind == "parquet":
        with open_parquet(path) as parquet:
            return {column.name: str(column.type) for column in parquet.schema_arrow}
    type_of = _csv_type if kind in ("csv", "tsv") else json_type
    types: dict[str, str] = {}
    for row in islice(read_rows(path, kind), SAMPLE_SIZE):
        for name, value in row.items():
            # One string makes a column of strings: in CSV the others only look like numbers.
            if types.get(name, "null") != "string":
                types[name] = types.get(name, "null") if value in (None, "") else type_of(value)
    if not types:
        raise UsageError(f"'{path}' has no rows; give a file with text")
    return types


def _csv_type(value: str) -> str:
    for number in (int, float):
        try:
            number(value)
        except ValueError:
            continue
        return number.__name__
    return "string"


def _read_texts(files: list[_TextFile]) -> Iterator[dict[str, str]]:
    """The texts of all files that are not blank, one by one."""
    for file in files:
        with naming_file(file.path):
            for number, row in enumerate(read_rows(file.path, file.kind, file.column), 1):
                text = row.get(file.column)
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise UsageError(
                        f"row {number} of '{file.path}' has {type(text).__name__} in column '{file.column}', which "
                        "must hold strings"
                    )
                if text.strip():
                    yield {"text": well_formed(text)}


def _pick_split(
    splits: dict[str, Dataset | IterableDataset], split: str, args: DataArguments
) -> Dataset | IterableDataset:
    """The texts of one of `splits`, the splits of `args.dataset_name`."""
    source = f"dataset '{args.dataset_name}'"
    if split not in splits:
        raise UsageError(f"{source} has no split '{split}'; its splits are: {', '.join(splits)}")
    dataset = splits[split]
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
        # Streams forget their features on the way.
        return dataset.filter(_has_text, batched=True).cast(_FEATURES)
    dataset = dataset.filter(
        _has_text, batched=True, load_from_cache_file=not args.overwrite_cache, desc="Dropping blank rows"
    )
    if len(dataset) == 0:
        raise UsageError(f"split '{split}' of {source} holds no text in column '{column}'; give another split")
    return dataset


def _has_text(batch: dict[str, list[str | None]]) -> list[bool]:
    return [text is not None and not text.isspace() and text != "" for text in batch["text"]]
