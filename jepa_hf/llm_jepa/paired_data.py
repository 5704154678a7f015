"""Rows that say the same thing twice: files or a data set with conversations, or with two columns of texts."""

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.arguments import DataArguments
from ..data.file_readers import file_kind, find_files, naming_file, read_rows, well_formed
from ..data.splits import hold_out, load_named
from ..data.text_datasets import embedded_corpus
from ..errors import UsageError


@dataclass
class PairedDataArguments:
    """Where rows with two views come from.

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
    validation_file: str | None = field(default=None, metadata={"help": "Files to evaluate on, as train_file."})
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "The column that is the first view. Default: messages where rows have them, else text."},
    )
    code_column_name: str | None = field(
        default=None,
        metadata={"help": "The column that is the second view, and the answer. Default: messages, else code."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "How many %% of the training rows to evaluate on if there are no others."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to cache datasets and models."})
    token: str | None = field(default=None, metadata={"help": "Token for private datasets and models on the Hub."})

    def __post_init__(self) -> None:
        if not 1 <= self.validation_split_percentage <= 99:
            raise UsageError(
                f"validation_split_percentage must be from 1 to 99, and {self.validation_split_percentage} is not"
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, and {value} is not; leave it out for no limit")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of `PairedViewTokenizer`."""
        return {"text_column": self.text_column_name or "text", "code_column": self.code_column_name or "code"}


class PairedRow(NamedTuple):
    """A row as `PairedViewTokenizer` reads it, and where it was: its source, and its number there from 0."""

    content: dict[str, Any]
    source: str
    number: int


def load_paired_rows(
    args: PairedDataArguments, *, seed: int, need_validation: bool
) -> tuple[list[PairedRow], list[PairedRow] | None]:
    """The rows to train and to evaluate on.

    Rows to evaluate on come from `validation_file`, else from the validation split of `dataset_name`, else
    `validation_split_percentage` of the rows to train on are set apart, the same ones for the same seed. Where columns
    are named, `messages` are left out.

    Raises:
        UsageError: files or data sets that are not there, cannot be read or hold no rows.
    """
    splits = {} if args.dataset_name is None else _named(args)
    if args.dataset_name is not None:
        train = _split(splits, args.dataset_train_split, args)
    elif args.train_file is not None:
        train = _files("train_file", args.train_file)
    else:
        train = embedded_rows()
    validation = None
    if need_validation:
        if args.validation_file is not None:
            validation = _files("validation_file", args.validation_file)
        elif splits and (args.dataset_validation_split or "validation" in splits):
            validation = _split(splits, args.dataset_validation_split or "validation", args)
        else:
            numbers = Dataset.from_dict({"number": range(len(train))})
            kept, held_out = hold_out(numbers, args.validation_split_percentage, seed)
            train, validation = [train[at] for at in kept["number"]], [train[at] for at in held_out["number"]]
        validation = _wanted(validation[: args.max_eval_samples], args)
    return _wanted(train[: args.max_train_samples], args), validation


def embedded_rows() -> list[PairedRow]:
    """The first and the second half of each paragraph of `embedded_corpus`, for a run without any data."""
    rows = []
    for number, paragraph in enumerate(embedded_corpus()):
        words = paragraph.split()[:24]
        text, code = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
        rows.append(PairedRow({"text": text, "code": code}, "the embedded corpus", number))
    return rows


def load_file_rows(argument: str, files: str, args: PairedDataArguments) -> list[PairedRow]:
    """The rows of files, `args` naming columns; `argument` is what an error calls them."""
    return _wanted(_files(argument, files), args)


def row_texts(content: dict[str, Any], args: PairedDataArguments) -> list[str]:
    """All texts of a row."""
    if content.get("messages") is not None:
        return [str(message.get("content", "")) for message in content["messages"] if isinstance(message, dict)]
    return [str(content.get(name, "")) for name in args.columns.values()]


def _files(argument: str, files: str) -> list[PairedRow]:
    rows = []
    for path in find_files(argument, files):
        if os.stat(path).st_size == 0:
            raise UsageError(f"{argument} '{path}' is empty; give a file with rows")
        kind = file_kind(path)
        if kind == "text":
            raise UsageError(
                f"{argument} '{path}' is plain text, which has no views; give json, jsonl, csv, tsv or parquet"
            )
        with naming_file(path):
            found = [PairedRow(row, f"{argument} '{path}'", number) for number, row in enumerate(read_rows(path, kind))]
        if not found:
            raise UsageError(f"{argument} '{path}' has no rows; give a file with rows")
        rows += found
    return rows


def _named(args: PairedDataArguments) -> dict[str, Any]:
    names = ("dataset_name", "dataset_config_name", "cache_dir", "token")
    return load_named(DataArguments(**{name: getattr(args, name) for name in names}))


def _split(splits: dict[str, Any], split: str, args: PairedDataArguments) -> list[PairedRow]:
    source = f"dataset '{args.dataset_name}'"
    if split not in splits:
        raise UsageError(f"{source} has no split '{split}'; its splits are: {', '.join(splits)}")
    if len(splits[split]) == 0:
        raise UsageError(f"split '{split}' of {source} has no rows; give another split")
    return [PairedRow(row, f"split '{split}' of {source}", number) for number, row in enumerate(splits[split])]


def _wanted(rows: list[PairedRow], args: PairedDataArguments) -> list[PairedRow]:
    """The rows without what no flag asks for, their texts such as UTF-8 can write."""
    named = args.text_column_name is not None or args.code_column_name is not None
    return [
        row._replace(
            content={name: _cleaned(value) for name, value in row.content.items() if not (named and name == "messages")}
        )
        for row in rows
    ]


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [_cleaned(part) for part in value]
    if isinstance(value, dict):
        return {name: _cleaned(part) for name, part in value.items()}
    return value
