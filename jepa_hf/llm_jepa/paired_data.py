"""Data with two views per row: conversations, or two columns of text."""

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.arguments import DataArguments
from ..data.file_readers import file_errors_as_usage_error, file_format, find_files, read_rows, replace_lone_surrogates
from ..data.splits import load_hub_dataset, train_validation_split
from ..data.text_datasets import builtin_corpus
from ..errors import UsageError


@dataclass
class PairedDataArguments:
    """Sources of rows with two views.

    Raises:
        UsageError: a number out of range.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the Hub, or a local directory that load_dataset can load."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split of the dataset to train on."})
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "The split of the dataset to evaluate on. Default: validation, if the dataset has it."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Files to train on: json, jsonl, csv, tsv or parquet, also with .gz; a glob, or several separated "
            "by commas."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Files to evaluate on, in the formats of train_file."}
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of the first view (default: messages if rows have them, else text)."},
    )
    code_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of the second view, the answer (default: messages if rows have them, else code)."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of training rows (default: all)."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of evaluation rows (default: all)."}
    )
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Percentage of the training rows to hold out if there is no evaluation data (1 to 99)."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Directory for cached datasets and models."})
    token: str | None = field(default=None, metadata={"help": "Token for private datasets and models on the Hub."})

    def __post_init__(self) -> None:
        if not 1 <= self.validation_split_percentage <= 99:
            raise UsageError(
                f"validation_split_percentage must be from 1 to 99, got {self.validation_split_percentage}."
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}. Leave it out for no limit.")

    @property
    def columns(self) -> dict[str, str]:
        """Return the column arguments of `PairedViewTokenizer`."""
        return {"text_column": self.text_column_name or "text", "code_column": self.code_column_name or "code"}


class PairedRow(NamedTuple):
    """A row for `PairedViewTokenizer`, with its source and its 0-based number there."""

    content: dict[str, Any]
    source: str
    number: int


def load_paired_rows(
    args: PairedDataArguments, *, seed: int, need_validation: bool
) -> tuple[list[PairedRow], list[PairedRow] | None]:
    """Load the training and evaluation rows.

    Evaluation rows come from `validation_file`, else from the validation split of `dataset_name`,
    else `validation_split_percentage` of the training rows are held out. If columns are named,
    `messages` are dropped.

    Args:
        args: the sources.
        seed: seed of the held-out rows.
        need_validation: whether to load evaluation rows; without it they are None.

    Raises:
        UsageError: files or data sets are missing, unreadable or empty.
    """
    splits = {} if args.dataset_name is None else _load_hub_splits(args)
    if args.dataset_name is not None:
        train = _split(splits, args.dataset_train_split, args)
    elif args.train_file is not None:
        train = _files("train_file", args.train_file)
    else:
        train = builtin_rows()
    validation = None
    if need_validation:
        if args.validation_file is not None:
            validation = _files("validation_file", args.validation_file)
        elif splits and (args.dataset_validation_split or "validation" in splits):
            validation = _split(splits, args.dataset_validation_split or "validation", args)
        else:
            numbers = Dataset.from_dict({"number": range(len(train))})
            remaining, held_out = train_validation_split(numbers, args.validation_split_percentage, seed)
            train, validation = [train[n] for n in remaining["number"]], [train[n] for n in held_out["number"]]
        validation = _clean_rows(validation[: args.max_eval_samples], args)
    return _clean_rows(train[: args.max_train_samples], args), validation


def builtin_rows() -> list[PairedRow]:
    """Return the two halves of each paragraph of `builtin_corpus`, for runs without data."""
    rows = []
    for number, paragraph in enumerate(builtin_corpus()):
        words = paragraph.split()[:24]
        text, code = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
        rows.append(PairedRow({"text": text, "code": code}, "the embedded corpus", number))
    return rows


def load_file_rows(argument: str, files: str, args: PairedDataArguments) -> list[PairedRow]:
    """Load the rows of files; `args` names their columns, and errors name `argument`."""
    return _clean_rows(_files(argument, files), args)


def row_texts(content: dict[str, Any], args: PairedDataArguments) -> list[str]:
    """Return all texts of a row."""
    if content.get("messages") is not None:
        return [str(message.get("content", "")) for message in content["messages"] if isinstance(message, dict)]
    return [str(content.get(name, "")) for name in args.columns.values()]


def _files(argument: str, files: str) -> list[PairedRow]:
    rows: list[PairedRow] = []
    for path in find_files(argument, files):
        if os.stat(path).st_size == 0:
            raise UsageError(f"{argument} '{path}' is empty. Give a file with rows.")
        kind = file_format(path)
        if kind == "text":
            raise UsageError(
                f"{argument} '{path}' is plain text, which has no views. Give json, jsonl, csv, tsv or parquet."
            )
        with file_errors_as_usage_error(path):
            loaded = [
                PairedRow(row, f"{argument} '{path}'", number) for number, row in enumerate(read_rows(path, kind))
            ]
        if not loaded:
            raise UsageError(f"{argument} '{path}' has no rows. Give a file with rows.")
        rows += loaded
    return rows


def _load_hub_splits(args: PairedDataArguments) -> dict[str, Any]:
    names = ("dataset_name", "dataset_config_name", "cache_dir", "token")
    return load_hub_dataset(DataArguments(**{name: getattr(args, name) for name in names}))


def _split(splits: dict[str, Any], split: str, args: PairedDataArguments) -> list[PairedRow]:
    source = f"dataset '{args.dataset_name}'"
    if split not in splits:
        raise UsageError(f"{source} has no split '{split}'. Its splits are: {', '.join(splits)}.")
    if len(splits[split]) == 0:
        raise UsageError(f"Split '{split}' of {source} has no rows. Give another split.")
    return [PairedRow(row, f"split '{split}' of {source}", number) for number, row in enumerate(splits[split])]


def _clean_rows(rows: list[PairedRow], args: PairedDataArguments) -> list[PairedRow]:
    """Drop `messages` if columns are named; replace lone surrogates, invalid in UTF-8."""
    drops_messages = args.text_column_name is not None or args.code_column_name is not None
    return [
        row._replace(
            content={
                name: _replace_surrogates(value)
                for name, value in row.content.items()
                if not (drops_messages and name == "messages")
            }
        )
        for row in rows
    ]


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, list):
        return [_replace_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {name: _replace_surrogates(part) for name, part in value.items()}
    return value
