"""Datasets of feature vectors and time series from arrays, tables, JSON, or the Hub."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, NamedSplit
from datasets.fingerprint import generate_random_fingerprint

from ..errors import UsageError
from ..utils.counts import counted
from .arguments import DataArguments
from .feature_blocks import BATCH_ROWS, BLOCK_SIZE, Block, Provenance, column_blocks, list_lengths, locate, to_floats
from .feature_columns import abbreviate, choose_columns
from .feature_readers import array_format, open_feature_file
from .file_readers import file_errors_as_usage_error, find_files, log_once, single_kind
from .splits import resolve_splits

logger = logging.getLogger(__name__)

# A column of fewer rows may count them by chance.
_MIN_NUMBERED = 10


def load_feature_datasets(
    args: DataArguments, *, seed: int, need_validation: bool, column_names: Sequence[str] | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load the vectors or the time series to train and to evaluate on.

    Each dataset has the one column `features`: float32 `[F]` in every row, or float32 `[T, F]`,
    where T may vary between rows. F is the same in all rows of both. `dataset.with_format("numpy")`
    returns them as arrays. Sources are those of `resolve_splits`.

    Tables are csv, tsv, json, jsonl and parquet files, each also gzipped, and datasets. Their numeric columns make up
    the vector, in the order of the first table; or one column of lists of numbers is the vector, or one of lists of
    lists the series. Later tables are matched by column name. `args.feature_column_names` selects columns. The default
    is all numeric columns except labels (`args.label_column_name`, or else label, labels, class and target) and row
    numbers (columns without a name, pandas' index). Booleans and classes do not count as numbers.

    Arrays are `[N, F]` or `[N, T, F]`. An .npz file of several arrays contributes `features`, `X` or `x`, or the one
    that `args.feature_column_names` names. An array `lengths` `[N]` in it holds the actual steps of padded series.
    Other types become float32; float32 of an .npy file is memory-mapped, so the file must not change.

    Args:
        args: Sources, columns and limits.
        seed: Seed of the held-out rows, not negative.
        need_validation: False ignores all validation sources.
        column_names: Columns that a trained encoder reads, in its order: its configuration's
            `feature_column_names`. Default: those of the first table.

    Returns:
        The training and the validation dataset; None for the latter unless `need_validation`.
        `feature_column_names` returns the columns behind their features.

    Raises:
        UsageError: Files, columns or splits do not exist or cannot be read. A value is missing,
            infinite or not representable as float32; a row or step has another width; a series is
            empty. Rows, steps and columns are counted from 1, without the header.
    """
    if args.streaming:
        raise UsageError("Features cannot be streamed, because all of them are checked first. Omit --streaming.")
    loader = _FeatureLoader(args, tuple(column_names or ()))
    train, validation = resolve_splits(
        args,
        seed=seed,
        need_validation=need_validation,
        load_files=loader.load_files,
        load_split=loader.load_split,
    )
    if validation is not None:
        shapes = [_describe_shape(dataset.data.schema.field("features").type) for dataset in (train, validation)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"The training data hold {shapes[0]}, the validation data {shapes[1]}. Provide the same features in "
                "both."
            )
    return train, validation


def select_features(dataset: Dataset, name: str, column_names: Sequence[str] | None = None) -> Dataset:
    """Return the features of a dataset's rows, as `load_feature_datasets` does; `name` describes it in errors."""
    return _FeatureLoader(DataArguments(), tuple(column_names or ())).load_table(dataset, name, "train")


def feature_column_names(dataset: Dataset) -> list[str] | None:
    """Return the names of the features, or of the one column of lists; None if they came from an array."""
    return json.loads(dataset.info.description or "null")


def feature_shape(dataset: Dataset) -> tuple[bool, int]:
    """Return whether the rows are series, and the width F of a vector or of a step."""
    shape = np.shape(dataset.with_format("numpy")[0]["features"])
    return len(shape) == 2, shape[-1]


def series_lengths(dataset: Dataset) -> np.ndarray:
    """Return the number of steps of each series in the column `features`."""
    batches = dataset.select_columns("features").with_format("arrow").iter(BATCH_ROWS)
    chunks = (chunk for batch in batches for chunk in batch.column("features").chunks)
    storages = (chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in chunks)
    return np.concatenate([list_lengths(storage) for storage in storages])


def feature_statistics(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population standard deviation of each feature, float32 `[F]`, over all rows and steps.

    The deviation of equal values is exactly 0, and is returned as 1, so that it can be divided by.
    """
    _, width = feature_shape(dataset)
    row_bytes = max(dataset.data.nbytes // dataset.data.num_rows, 1)
    moments = _Moments()
    batches = dataset.select_columns("features").with_format("arrow")
    for batch in batches.iter(max(BLOCK_SIZE // row_bytes, 1)):
        for chunk in batch.column("features").chunks:
            if len(chunk):
                moments += _Moments.of(to_floats(chunk).reshape(-1, width))
    deviation = moments.deviation.astype(np.float32)
    return moments.mean.astype(np.float32), np.where(deviation == 0, np.float32(1), deviation)


@dataclass(frozen=True)
class _Moments:
    """Number of rows, mean and sum of squared deviations of each column, float64 `[F]`.

    They are merged as in Chan, Golub and LeVeque (1983), "Algorithms for computing the sample
    variance": memory stays constant, and a large mean costs no precision.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(()))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(()))

    @classmethod
    def of(cls, values: np.ndarray) -> "_Moments":
        """Compute those of rows `[N, F]`, at least one."""
        values = values.astype(np.float64, copy=False)
        mean = values.mean(axis=0)
        return cls(len(values), mean, np.square(values - mean).sum(axis=0))

    def __add__(self, other: "_Moments") -> "_Moments":
        total = self.count + other.count
        if not total:
            return self
        difference = other.mean - self.mean
        squares = self.squares + other.squares + difference**2 * (self.count * other.count / total)
        return _Moments(total, self.mean + difference * (other.count / total), squares)

    @property
    def deviation(self) -> np.ndarray:
        """The population standard deviation."""
        return np.sqrt(self.squares / self.count)


@dataclass
class _FeatureLoader:
    """Loads rows from files and splits; `columns` are those of the first table, if not given."""

    args: DataArguments
    columns: tuple[str, ...] = ()
    messages: set[str] = field(default_factory=set)

    def load_files(self, argument: str) -> Dataset:
        """Load the rows of the files that the argument of this name lists."""
        files = getattr(self.args, argument)
        paths = find_files(argument, files)
        kind = single_kind(argument, files, map(array_format, paths))
        chunks: list[pa.Array] = []
        moments = _Moments()
        for path in paths:
            with file_errors_as_usage_error(path):
                source, blocks, message = open_feature_file(path, kind, self.args, self.columns)
                self._note_columns(source, message)
                file_chunks, file_moments = _arrow_chunks(source, blocks)
            # Compare descriptions, because the types of series are equal whatever their width.
            if chunks and _describe_shape(file_chunks[0].type) != _describe_shape(chunks[0].type):
                raise UsageError(
                    f"{source.name} holds {_describe_shape(file_chunks[0].type)} and '{paths[0]}' "
                    f"{_describe_shape(chunks[0].type)}. Provide files with the same features."
                )
            chunks += file_chunks
            moments += file_moments
        _check_spread(moments, f"{argument} '{files}'", source)
        return _to_dataset(chunks, source.columns, argument.removesuffix("_file"))

    def load_split(self, dataset: Dataset, split: str) -> Dataset:
        """Load the rows of a split of `args.dataset_name`."""
        return self.load_table(dataset, f"split '{split}' of dataset '{self.args.dataset_name}'", split)

    def load_table(self, dataset: Dataset, name: str, split: str) -> Dataset:
        """Load the rows of a dataset; `name` describes it in errors."""
        # Class numbers are not quantities.
        types = {
            column.name: pa.string() if isinstance(dataset.features[column.name], ClassLabel) else column.type
            for column in dataset.features.arrow_schema
        }
        source, message = choose_columns(types, name, self.args, self.columns)
        self._note_columns(source, message)
        tables = dataset.select_columns(list(source.columns)).with_format("arrow").iter(BATCH_ROWS)
        batches = (batch.select(source.columns).columns for table in tables for batch in table.to_batches())
        chunks, moments = _arrow_chunks(source, column_blocks(batches, source))
        _check_spread(moments, name, source)
        return _to_dataset(chunks, source.columns, split)

    def _note_columns(self, source: Provenance, message: str) -> None:
        """Keep the columns of the first table for later ones, and log the choice once."""
        if not source.columns and self.columns:
            message = f"no column names; its columns are read as {abbreviate(self.columns)}, in this order"
        self.columns = self.columns or source.columns
        if message and message not in self.messages:
            logger.info("%s: %s", source.name, message)
            self.messages.add(message)


def _arrow_chunks(source: Provenance, blocks: Iterator[Block]) -> tuple[list[pa.Array], _Moments]:
    """Read all rows of a source as float32; return also the moments of numbers that are more precise.

    Raises:
        UsageError: There are no rows, or a number is not finite.
    """
    chunks = []
    rows, moments = 0, _Moments()
    for block in blocks:
        precise = block.values
        with np.errstate(over="ignore"):  # overflow becomes infinite, which is an error
            block = replace(block, values=precise.astype(np.float32, copy=False))
        finite = np.isfinite(block.values)
        if not finite.all():
            index, column = divmod(int(finite.argmin()), finite.shape[1])
            row, step = locate(index, block.lengths)
            raise source.invalid_value_error(str(block.values[index, column]), source.locate(rows + row, step), column)
        if precise.dtype != np.float32:
            moments += _Moments.of(precise)
        chunks.append(block.to_arrow())
        rows += len(block)
    if not rows:
        raise UsageError(f"No rows in {source.name}. Provide data with at least one.")
    if source.columns and not source.depth:
        _warn_of_row_numbers(to_floats(chunks[0]).reshape(len(chunks[0]), -1), source)
    return chunks, moments


def check_precision(rows: Sequence[np.ndarray], columns: Sequence[str], name: str) -> None:
    """Check the precision of raw features as that of tables, see `_check_spread`.

    Args:
        rows: Vectors `[F]` or series `[T, F]`, all of the same width, before they become float32.
        columns: Names of the columns; empty if they have none.
        name: Description of the rows for errors.
    """
    moments = _Moments()
    for begin in range(0, len(rows), BATCH_ROWS):
        values = np.concatenate([np.atleast_2d(row) for row in rows[begin : begin + BATCH_ROWS]])
        if values.dtype not in (np.float32, np.float16):
            moments += _Moments.of(values)
    _check_spread(moments, name, Provenance(name, tuple(columns)))


def _check_spread(moments: _Moments, name: str, source: Provenance) -> None:
    """Warn of columns whose values differ by less than float32 resolves at their mean.

    Raises:
        UsageError: These are all columns that are not constant.
    """
    if not moments.count:
        return
    mean, deviation = np.abs(moments.mean), moments.deviation
    # Smaller deviations are rounding errors of float64 in the mean of equal values.
    varies = deviation > 8 * np.spacing(mean)
    lost = varies & (deviation < np.spacing(mean.astype(np.float32)))
    if not lost.any():
        return
    named = source.columns if not source.depth else ()
    columns = [f"'{named[index]}'" if named else f"number {index + 1}" for index in np.flatnonzero(lost)]
    first = int(lost.argmax())
    message = (
        f"In {name}, float32 loses the differences between the values of {counted(len(columns), 'column')} "
        f"({abbreviate(columns)}). The standard deviation of the first is {deviation[first]:.3g} around the mean "
        f"{moments.mean[first]:.9g}. Subtract a constant from each of them in float64, such as its mean, and save it "
        "again"
    )
    if (lost == varies).all():
        raise UsageError(f"{message}.")
    log_once(message, logging.WARNING)


def _warn_of_row_numbers(values: np.ndarray, source: Provenance) -> None:
    """Warn of a named column that counts the rows from 0 or 1, which is rarely a feature."""
    counts_rows = np.isin(values[0], (0, 1)) & (np.diff(values, axis=0) == 1).all(axis=0)
    if len(values) >= _MIN_NUMBERED:
        for column in np.flatnonzero(counts_rows):
            log_once(
                f"column '{source.columns[column]}' of {source.name} counts the rows; unless that is a feature, leave "
                "it out with --feature_column_names",
                logging.WARNING,
            )


def _to_dataset(chunks: list[pa.Array], columns: Sequence[str], split: str) -> Dataset:
    table = pa.table({"features": pa.chunked_array(chunks)})
    info = DatasetInfo(description=json.dumps(columns) if columns else "")
    # A random fingerprint saves hashing all the data.
    return Dataset(table, info=info, split=NamedSplit(split), fingerprint=generate_random_fingerprint())


def _describe_shape(kind: pa.DataType) -> str:
    """Describe the shape of rows of an Arrow type."""
    if isinstance(kind, pa.ExtensionType):
        return f"series with {kind.shape[1]} numbers a step"
    return f"vectors of {kind.list_size} numbers"
