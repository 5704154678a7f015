"""Inference of a task's kind from its columns, and the conversion of the columns to samples and targets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.feature_columns import is_unnamed, label_columns
from ..data.feature_csv import has_decimal_comma, is_number
from ..data.feature_datasets import feature_column_names, load_feature_datasets
from ..data.image_datasets import IMAGE_COLUMNS, usual_image_column
from ..data.text_columns import not_text_error
from ..errors import UsageError
from .task import Kind, Split, TaskArguments
from .task_tables import Table

_TEXT_COLUMNS = ("text", "sentence")  # the first one present is used
_SCORED_PAIR = ("sentence1", "sentence2", "score")
_PAIRS = (
    ("anchor", "positive"),
    ("query", "document"),
    ("question", "answer"),
    ("title", "text"),
    ("text", "code"),
    ("sentence1", "sentence2"),
)


def infer_columns(table: Table, args: TaskArguments) -> tuple[Kind, str, tuple[str, ...]]:
    """Infer kind, modality, and the columns of the samples, then of the labels or scores."""
    names = table.columns
    texts = () if args.text_column_name is None else tuple(map(str.strip, args.text_column_name.split(",")))
    for name in (*texts, *([args.label_column_name] if args.label_column_name else [])):
        if name not in names:
            raise UsageError(f"{table.place} has no column {name!r}. Its columns are: {', '.join(names) or '(none)'}.")
    if len(texts) > 2:
        raise UsageError(f"Expected text_column_name to be one column, or two for pairs, got {len(texts)}.")
    if len(texts) == 2:
        return "retrieval", "text", texts
    if not texts and args.label_column_name is None and set(_SCORED_PAIR) <= set(names):
        return "similarity", "text", _SCORED_PAIR

    label = next(iter(label_columns(names, args.label_column_name)), None)
    if label is not None:
        return "labels", *_infer_sample_columns(table, label, texts, args)
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    if pair is None or texts:
        raise UsageError(
            f"{table.place} has neither a column of labels nor pairs of texts. Name the labels by --label_column_name, "
            f"or the pairs by --text_column_name first,second. Its columns are: {', '.join(names) or '(none)'}."
        )
    return "retrieval", "text", pair


def _infer_sample_columns(
    table: Table, label: str, texts: tuple[str, ...], args: TaskArguments
) -> tuple[str, tuple[str, ...]]:
    """Infer the modality and the columns of labelled samples (features: labels only)."""
    labels = (label, *label_columns(table.columns, args.label_column_name))
    others = [name for name in table.columns if name not in labels and not is_unnamed(name)]
    # A column of texts may come with row numbers.
    others = [name for name in others if not _counts_rows(table.columns[name])] or others
    images = [name for name in others if name in IMAGE_COLUMNS or _is_image_column(table.columns[name])]
    image = usual_image_column(images)
    text = next(iter(texts), None) or next((name for name in _TEXT_COLUMNS if name in others), None)
    if image is not None and not texts and (text is None or image in IMAGE_COLUMNS):
        return "images", (image, label)
    if text is None and len(images) > 1:
        raise UsageError(f"{table.place} has several columns of images: {', '.join(images)}. Rename one to image.")
    all_text = text is None and others and all(_is_text_column(table.columns[name]) for name in others)
    if all_text and len(others) == 1:
        text = others[0]
    if text is not None:
        return "text", (text, label)
    if all_text:
        raise UsageError(
            f"{table.place} has several columns of texts: {', '.join(others)}. Name one by --text_column_name."
        )
    return "features", (label,)


def _is_image_column(values: list[Any]) -> bool:
    """Return whether the values are encoded images: bytes, or dicts with `bytes`."""
    filled = [value for value in values if value is not None]
    return bool(filled) and all(
        isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value) for value in filled
    )


def _is_text_column(values: list[Any]) -> bool:
    """Return whether the values are strings, but not the numbers of a CSV file."""
    return all(isinstance(value, str) for value in values) and not all(
        is_number(value) or has_decimal_comma(value) for value in values
    )


def _counts_rows(values: list[Any]) -> bool:
    """Return whether the values, maybe of a CSV file, count the rows from 0 or 1."""
    first = str(values[0])
    return first in ("0", "1") and all(str(value) == str(row) for row, value in enumerate(values, int(first)))


def read_splits(
    tables: Mapping[str, Table],
    kind: Kind,
    modality: str,
    columns: tuple[str, ...],
    column_names: Sequence[str] | None = None,
) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    """Convert tables, training rows first, to splits.

    `columns` are those of the samples, then of the labels or scores, see `infer_columns`. `column_names` are the
    features that encoders read, by default those of the first table.

    Returns:
        The splits by name, and the columns behind their features, if they have names.

    Raises:
        UsageError: a column is missing, or holds values of another type.
    """
    splits: dict[str, Split] = {}
    names = None if column_names is None else tuple(column_names)
    for split, table in tables.items():
        for name in columns:
            if name not in table.columns:
                raise UsageError(f"{table.place} has no column {name!r}, but another split has. Add the column.")
        if modality == "features":
            features, names = _features(table, columns[0], names)
            samples: tuple[list[Any], ...] = (features,)
        elif modality == "images":
            samples = ([_stored_image(value, table.folder) for value in table.columns[columns[0]]],)
        else:
            samples = tuple(_texts(table, name) for name in (columns[:1] if kind == "labels" else columns[:2]))
        targets = {"labels": _labels, "similarity": _scores}.get(kind)
        splits[split] = Split(samples, targets and targets(table, columns[-1]))
    return splits, names


def _texts(table: Table, name: str) -> list[str]:
    for row, value in enumerate(table.columns[name]):
        if not isinstance(value, str):
            raise not_text_error(f"Row {row + 1} of {table.place}", name, value)
    return table.columns[name]


def _stored_image(value: Any, folder: Path) -> Any:
    """Convert to `datasets.Image(decode=False)`; paths are relative to the table's folder."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": str(folder / value)}
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        return {"bytes": None, "path": str(folder / value["path"])}
    return value


def _features(
    table: Table, label: str, names: tuple[str, ...] | None
) -> tuple[list[np.ndarray], tuple[str, ...] | None]:
    if label in (names or ()):
        raise UsageError(
            f"Column {label!r} of {table.place} holds the labels, but an encoder reads it as a feature, so the scores "
            "would say nothing. Name another column by --label_column_name."
        )
    rows, _ = load_feature_datasets(table.arguments, seed=0, need_validation=False, column_names=names)
    if len(rows) != len(table.columns[label]):
        raise UsageError(
            f"{table.place} has {len(rows)} rows of features, but {len(table.columns[label])} labels. Give one per row."
        )
    found = feature_column_names(rows)
    return [np.asarray(row) for row in rows.with_format("numpy")["features"]], None if found is None else tuple(found)


def _labels(table: Table, name: str) -> np.ndarray:
    """Return classes as strings, so that 1 in JSON and 1 in CSV are equal."""
    classes = []
    for row, value in enumerate(table.columns[name]):
        if value is None or value == "":
            raise UsageError(f"Row {row + 1} of {table.place} has no label in column {name!r}. Remove the row.")
        if isinstance(value, float) and not value.is_integer():
            raise UsageError(
                f"Expected a class in column {name!r}, got the number {value} in row {row + 1} of {table.place}. "
                "Name a column of classes by --label_column_name."
            )
        if not isinstance(value, (str, int, float)):
            raise UsageError(
                f"Expected a class in column {name!r}, got {type(value).__name__} in row {row + 1} of {table.place}."
            )
        classes.append(str(int(value)) if isinstance(value, float) else str(value))
    return np.array(classes)


def _scores(table: Table, name: str) -> np.ndarray:
    scores = np.empty(len(table))
    for row, value in enumerate(table.columns[name]):
        try:
            scores[row] = float(value)
        except (TypeError, ValueError, OverflowError):
            scores[row] = np.nan
        if not np.isfinite(scores[row]):
            raise UsageError(
                f"Expected a finite number with a decimal point in column {name!r}, got {value!r:.40} in row {row + 1} "
                f"of {table.place}. Fix it."
            )
    return scores
