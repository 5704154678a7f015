"""Data with two views per row: conversations, or two columns of text."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.arguments import BaseDataArguments
from ..data.file_readers import file_errors_as_usage_error, file_format, find_files, read_rows, replace_lone_surrogates
from ..data.splits import resolve_splits
from ..data.text_datasets import builtin_corpus
from ..errors import UsageError
from ..utils.flags import flag
from .conversations import read_conversation


@dataclass
class PairedDataArguments(BaseDataArguments):
    """Sources of rows with two views.

    Raises:
        UsageError: a number out of range.
    """

    train_file: str | None = flag(
        None,
        "Files to train on: json, jsonl, csv, tsv or parquet, also with .gz; a glob, or several separated by commas.",
    )
    text_column_name: str | None = flag(
        None,
        "Column of the first view (default: messages if rows have them, else prompt of prompt and "
        "completion, or text).",
    )
    code_column_name: str | None = flag(
        None, "Column of the second view, the answer (default: messages if rows have them, else completion, or code)."
    )

    @property
    def columns(self) -> dict[str, str | None]:
        """Return the column arguments of `PairedViewTokenizer`."""
        return {"text_column": self.text_column_name, "code_column": self.code_column_name}


class PairedRow(NamedTuple):
    """A row for `PairedViewTokenizer`, with its source and its 0-based number there."""

    content: dict[str, Any]
    source: str
    number: int


def load_paired_rows(
    args: PairedDataArguments, *, seed: int, need_validation: bool
) -> tuple[list[PairedRow], list[PairedRow] | None]:
    """Load the training and evaluation rows from the sources of `resolve_splits`, without any from `builtin_rows`."""
    train, validation = resolve_splits(
        args,
        seed=seed,
        need_validation=need_validation,
        load_files=lambda argument: _files(argument, getattr(args, argument)),
        load_split=lambda rows, split: _split_rows(rows, split, args),
        load_default=builtin_rows,
    )
    return _clean_rows(train), None if validation is None else _clean_rows(validation)


def builtin_rows() -> list[PairedRow]:
    """Return the two halves of each paragraph of `builtin_corpus`, for runs without data."""
    rows = []
    for number, paragraph in enumerate(builtin_corpus()):
        words = paragraph.split()[:24]
        text, code = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
        rows.append(PairedRow({"text": text, "code": code}, "the built-in corpus", number))
    return rows


def load_file_rows(argument: str, files: str) -> list[PairedRow]:
    """Load the rows of files; errors name `argument`."""
    return _clean_rows(_files(argument, files))


def row_texts(row: PairedRow, args: PairedDataArguments) -> list[str]:
    """Return the texts of a row's messages."""
    try:
        conversation = read_conversation(row.content, row.number, **args.columns)
    except UsageError as error:
        raise UsageError(f"{row.source}: {error}") from None
    return [message["content"] for message in conversation.messages]


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


def _split_rows(rows: Any, split: str, args: PairedDataArguments) -> list[PairedRow]:
    source = f"split '{split}' of dataset '{args.dataset_name}'"
    if len(rows) == 0:
        raise UsageError(f"{source[0].upper() + source[1:]} has no rows. Give another split.")
    return [PairedRow(row, source, number) for number, row in enumerate(rows)]


def _clean_rows(rows: list[PairedRow]) -> list[PairedRow]:
    """Replace lone surrogates, invalid in UTF-8."""
    return [row._replace(content=_replace_surrogates(row.content)) for row in rows]


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, list):
        return [_replace_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {name: _replace_surrogates(part) for name, part in value.items()}
    return value
