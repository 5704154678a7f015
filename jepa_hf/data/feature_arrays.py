"""Readers of feature arrays in npy and npz files."""

import struct
import zlib
from collections.abc import Iterator
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np

from ..errors import UsageError, one_line
from .arguments import DataArguments
from .feature_blocks import BLOCK_SIZE, Block, Provenance
from .feature_columns import label_columns

# Errors of numpy and zipfile on damaged files. An array's header is a Python literal, hence also syntax errors.
_ARRAY_ERRORS = (
    ValueError, EOFError, SyntaxError, TokenError, TypeError, MemoryError, OverflowError, RuntimeError, struct.error,
    zlib.error, BadZipFile,
)  # fmt: skip


def load_npy(path: str, args: DataArguments) -> tuple[np.ndarray, None]:
    """Return the array of a file, memory-mapped, without lengths."""
    if args.feature_column_names is not None:
        raise UsageError(f"'{path}' has no column names. Omit --feature_column_names.")
    try:
        return np.lib.format.open_memmap(path, mode="r"), None
    except _ARRAY_ERRORS as error:
        raise _array_error(path, error) from None


def load_npz(path: str, args: DataArguments) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the array of features and, if the file has them, the lengths of its series."""
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            name = _choose_array(archive.files, path, args)
            array = np.asarray(archive[name])
            lengths = np.asarray(archive["lengths"]) if "lengths" in archive.files and array.ndim == 3 else None
    except UsageError:
        raise
    except _ARRAY_ERRORS as error:
        raise _array_error(path, error) from None
    if lengths is not None:
        if lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu":
            raise UsageError(
                f"'{path}' has {lengths.dtype} lengths of shape {lengths.shape} for {name} of shape {array.shape}. "
                "Save one integer per series."
            )
        invalid = np.flatnonzero((lengths < 1) | (lengths > array.shape[1]))
        if invalid.size:
            raise UsageError(
                f"Row {invalid[0] + 1} of '{path}' has the length {lengths[invalid[0]]}. Lengths must be from 1 to the "
                f"padded length {array.shape[1]}."
            )
    return array, lengths


def _choose_array(names: list[str], path: str, args: DataArguments) -> str:
    """Return the name of the array of features: from `args`, the only one, or a usual name."""
    if args.feature_column_names is not None:
        if args.feature_column_names not in names:
            raise UsageError(
                f"'{path}' has no array '{args.feature_column_names}'. Name one with --feature_column_names, out of: "
                f"{', '.join(names)}."
            )
        return args.feature_column_names
    others = ("lengths", *label_columns(names, args.label_column_name))
    candidates = [name for name in names if name not in others]
    if len(candidates) != 1:
        candidates = [name for name in candidates if name in ("features", "X", "x")]
    if len(candidates) != 1:
        raise UsageError(
            f"'{path}' has the arrays {', '.join(names) or '(none)'}, of which none or several may hold the features. "
            "Name one with --feature_column_names."
        )
    return candidates[0]


def _array_error(path: str, error: Exception) -> UsageError:
    reason = (str(error) or "it is damaged").splitlines()[0].rstrip(".")
    return UsageError(
        f"'{path}' cannot be read as an array of numbers: {reason}. Write it with numpy.save, or a padded array of "
        "series and their lengths with numpy.savez."
    )


def flat_arrays(path: str) -> dict[str, np.ndarray]:
    """Return the one-dimensional arrays of an npz file, such as labels."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (*_ARRAY_ERRORS, OSError) as error:
        raise UsageError(f"'{path}' cannot be read as arrays: {one_line(error)}. Save it again.") from None
    return {name: array for name, array in arrays.items() if array.ndim == 1}


def array_blocks(array: np.ndarray, lengths: np.ndarray | None, source: Provenance) -> Iterator[Block]:
    """Turn an array `[N, F]` or `[N, T, F]`, with the lengths `[N]` of its series, into blocks of rows."""
    if array.dtype.kind not in "iuf":
        raise UsageError(f"{source.name} holds {array.dtype}, not numbers. Save integers or floats.")
    if array.ndim not in (2, 3) or 0 in array.shape[1:]:
        raise UsageError(
            f"{source.name} has the shape {array.shape}. Save vectors as [rows, features], series as [rows, steps, "
            "features]."
        )
    rows = max(BLOCK_SIZE // array[:1].size, 1) if len(array) else 1
    for start in range(0, len(array), rows):
        values = np.ascontiguousarray(array[start : start + rows], dtype=np.result_type(array, np.float32))
        if array.ndim == 2:
            yield Block(values, None)
        elif lengths is None:
            yield Block(values.reshape(-1, values.shape[2]), np.full(len(values), values.shape[1]))
        else:
            block_lengths = lengths[start : start + rows].astype(np.int64)
            yield Block(values[np.arange(values.shape[1]) < block_lengths[:, None]], block_lengths)
