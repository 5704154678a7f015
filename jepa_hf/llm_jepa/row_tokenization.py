"""Tokenization of data sets, and the counts of rows that are cut or left out."""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import datasets

from ..errors import UsageError
from ..training.inputs import iterate_rows
from ..utils.counts import counted
from .paired_data import PairedRow
from .view_tokenizer import IGNORE_INDEX, OverlongRowError, PairedViewTokenizer, special_ids

logger = logging.getLogger(__name__)


def tokenize_rows(rows: Iterable[PairedRow], view_tokenizer: PairedViewTokenizer) -> list[dict[str, Any]]:
    """Tokenize rows, and log how many were truncated, left out, or have no stop token."""
    tokenized: list[dict[str, Any]] = []
    left_out = 0
    for row in rows:
        try:
            tokens = view_tokenizer(row.content, row.number)
        except UsageError as error:
            if isinstance(error, OverlongRowError) and view_tokenizer.filter_overlong_rows:
                left_out += 1
                continue
            raise UsageError(f"{row.source}: {error}" if row.source else str(error)) from None
        if tokens["truncated"] and view_tokenizer.filter_overlong_rows:
            left_out += 1
        else:
            tokenized.append(tokens)
    _log_counts(tokenized, left_out, view_tokenizer)
    return tokenized


def _log_counts(rows: list[dict[str, Any]], left_out: int, view_tokenizer: PairedViewTokenizer) -> None:
    """Log the counts on rank 0; all ranks read the same rows."""
    total, limit = len(rows) + left_out, view_tokenizer.max_length
    if left_out and not rows:
        raise UsageError(
            f"filter_overlong_rows leaves none of {counted(total, 'row')}: all are longer than {limit} tokens. "
            "Increase max_length (--max_seq_length)."
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if left_out:
        logger.warning("left out %d of %d rows: longer than %d tokens", left_out, total, limit)
    truncated = sum(row["truncated"] for row in rows)
    if truncated:
        logger.warning("truncated %d of %d rows to %d tokens", truncated, total, limit)
    special = special_ids(view_tokenizer.tokenizer)
    endless = sum(not row["truncated"] and last_label(row) not in special for row in rows)
    if endless and not view_tokenizer.train_on_prompt:
        logger.warning(
            "%d of %d answers end without a special token, so the model may not learn where to stop; give "
            "--chat_template_path a template that writes one, or a tokenizer with an eos_token",
            endless,
            total,
        )


def has_label(row: Mapping[str, Any]) -> bool:
    """Return whether a tokenized row has a label; the first token, which nothing predicts, needs none."""
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


def last_label(row: Mapping[str, Any]) -> int:
    """Return the last label of a tokenized row that has labels."""
    return next(label for label in reversed(row["labels"]) if label != IGNORE_INDEX)


def is_untokenized(dataset: Any) -> bool:
    """Return whether a data set, or one of several by name, has rows that `PairedViewTokenizer` has to read."""
    if isinstance(dataset, dict):
        return any(map(is_untokenized, dataset.values()))
    if dataset is None or isinstance(dataset, str):
        return False
    first = next(iterate_rows(dataset), None)
    return first is not None and not (isinstance(first, Mapping) and "stp_span" in first)


def tokenize_dataset(dataset: Any, view_tokenizer: PairedViewTokenizer | None) -> Any:
    """Tokenize a data set like `tokenize_rows`; tokenized rows are returned unchanged.

    Rows of a stream are tokenized during iteration, without the counts.
    """
    if not is_untokenized(dataset):
        return dataset
    if isinstance(dataset, dict):
        return {name: tokenize_dataset(part, view_tokenizer) for name, part in dataset.items()}
    if view_tokenizer is None:
        raise UsageError("Expected tokenized rows, got rows of text. Pass view_tokenizer=... to tokenize them.")
    if isinstance(dataset, datasets.IterableDataset):
        return _tokenize_stream(dataset, view_tokenizer)
    return tokenize_rows(
        (PairedRow(row, "", number) for number, row in enumerate(iterate_rows(dataset))), view_tokenizer
    )


def _tokenize_stream(dataset: datasets.IterableDataset, view_tokenizer: PairedViewTokenizer) -> Any:
    columns = dataset.column_names
    if not view_tokenizer.filter_overlong_rows:
        return dataset.map(view_tokenizer, with_indices=True, remove_columns=columns)

    def tokenize(row: Any, number: int) -> dict[str, Any]:
        try:
            return view_tokenizer(row, number)
        except OverlongRowError:
            return {"truncated": True}

    return dataset.map(tokenize, with_indices=True, remove_columns=columns).filter(lambda row: not row["truncated"])
