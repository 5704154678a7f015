"""Samples as `Embedder.embed` accepts them: one or many, in the containers that users have at hand."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from PIL import Image

from ..data.feature_datasets import feature_column_names, select_features
from ..data.splits import dataset_from_pandas
from ..errors import UsageError


def list_texts(samples: Any) -> tuple[list[Any], bool]:
    """Return the texts, and whether a single one was given.

    Raises:
        UsageError: the samples are a table, a path, or nothing to iterate over.
    """
    samples = _unwrap(samples)
    if isinstance(samples, str):
        return [samples], True
    if isinstance(samples, (Path, bytes)):
        raise _samples_error("a text or a list of texts", samples, " To embed files, use jepa-hf embed.")
    return _to_list(samples, "a text or a list of texts"), False


def list_images(samples: Any) -> tuple[list[Any], bool]:
    """Return the images, and whether a single one was given; paths and bytes as dicts of `bytes` and `path`.

    Raises:
        UsageError: the samples are a table, or nothing to iterate over.
    """
    samples = _unwrap(samples)
    if isinstance(samples, (str, Path, bytes, Image.Image)) or (
        isinstance(samples, Mapping) and {"bytes", "path"} & samples.keys()
    ):
        return [_stored_image(samples)], True
    # An array with channels first, which could be grey images as well, is refused as one image.
    if isinstance(samples, np.ndarray) and (
        samples.ndim < 3 or (samples.ndim == 3 and (samples.shape[2] in (1, 3, 4) or samples.shape[0] in (3, 4)))
    ):
        return [samples], True
    return [_stored_image(sample) for sample in _to_list(samples, "an image or a list of images")], False


def list_features(
    samples: Any, row_dims: int, names: Sequence[str] | None
) -> tuple[list[Any], bool, Sequence[str] | None]:
    """Return the rows of features, whether a single one was given, and the columns' names if it is a table.

    A table is a DataFrame, a Dataset, or rows with names (dicts, namedtuples, rows of a DataFrame). A row has
    `row_dims` dimensions; `names` are the columns that the encoder reads, if they are known.

    Raises:
        UsageError: a table lacks a column, or there is nothing to iterate over.
    """
    samples = _as_mapping(_unwrap(samples))
    single = isinstance(samples, Mapping)
    if single:
        samples = [samples]
    if not isinstance(samples, (pd.DataFrame, Dataset)):
        rows = [_as_mapping(_unwrap(row)) for row in _to_list(samples, "rows of features")]
        if not (rows and all(isinstance(row, Mapping) for row in rows)):
            is_row = bool(rows) and 1 + _num_dims(rows[0]) == row_dims
            return ([samples] if is_row else rows), is_row, None
        samples = pd.DataFrame(rows)
    if not len(samples):
        return [], False, None
    if isinstance(samples, pd.DataFrame):
        samples = dataset_from_pandas(samples, "The table of samples")
    table = select_features(samples, "the samples", names)
    return list(table.with_format("numpy")[:]["features"]), single, feature_column_names(table)


def _unwrap(samples: Any) -> Any:
    """Convert tensors to arrays, and arrays without dimensions to their value."""
    if isinstance(samples, torch.Tensor):
        samples = samples.numpy(force=True)
    return samples.item() if isinstance(samples, np.ndarray) and samples.ndim == 0 else samples


def _as_mapping(row: Any) -> Any:
    """Convert a row that carries names, a row of a DataFrame or a namedtuple, to a dict by name."""
    if isinstance(row, pd.Series) and all(isinstance(name, str) for name in row.index) and np.ndim(row.iloc[0]) == 0:
        return row.to_dict()
    names = getattr(row, "_fields", None)  # of a namedtuple
    return row if names is None else dict(zip(names, row, strict=True))


def _to_list(samples: Any, expected: str) -> list[Any]:
    if isinstance(samples, (Dataset, pd.DataFrame)):
        raise _samples_error(expected, samples, f" Give one of its columns, such as data['{expected.split()[1]}'].")
    if not isinstance(samples, Iterable) or isinstance(samples, (str, bytes, Mapping, set, frozenset)):
        raise _samples_error(expected, samples)
    return list(samples)


def _samples_error(expected: str, samples: Any, remedy: str = "") -> UsageError:
    return UsageError(f"Expected {expected}, got {type(samples).__name__}.{remedy}")


def _stored_image(sample: Any) -> Any:
    if isinstance(sample, (str, Path)):
        return {"bytes": None, "path": str(sample)}
    return {"bytes": sample, "path": None} if isinstance(sample, bytes) else sample


def _num_dims(value: Any) -> int:
    """Return the depth of nested lists, or the dimensions of an array, along the first entries."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim
    return 1 + _num_dims(value[0]) if isinstance(value, (list, tuple)) and value else 0
