"""Where feature vectors and time series come from: arrays, tables, JSON, or a dataset on the Hub."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, NamedSplit
from datasets.fingerprint import generate_random_fingerprint

from ..errors import UsageError
from .arguments import DataArguments
from .feature_readers import (
    BATCH_ROWS,
    BLOCK_SIZE,
    Block,
    Source,
    array_kind,
    choose_columns,
    column_blocks,
    list_lengths,
    locate,
    open_feature_file,
    plain_numbers,
)
from .file_readers import find_files, naming_file
from .splits import first_samples, hold_out, load_named


def load_feature_datasets(args: DataArguments, *, seed: int, need_validation: bool) -> tuple[Dataset, Dataset | None]:
    """Load the vectors or the time series to train and to evaluate on.

    Each dataset has the one column `features`: float32 `[F]` in every row, or float32 `[T, F]`, where T may vary from
    row to row; F is the same in all rows of both. `dataset.with_format("numpy")` gives them as arrays.

    Rows to train on come from `args.train_file` or `args.dataset_name`. Rows to evaluate on come from
    `args.validation_file`, else from the validation split of `args.dataset_name`, else
    `args.validation_split_percentage` of the training rows (at least one, and not all) are set apart, the same ones for
    the same `seed`; the rest keeps its order.

    Tables are csv, tsv, json, jsonl and parquet files, each also gzipped, and datasets. Their columns of numbers make
    the vector, in the order of the first table; or one column of lists of numbers makes it, or one of lists of lists
    the series. `args.feature_column_names` chooses; by default all columns of numbers but `args.label_column_name` are
    taken. Booleans and classes are no numbers.

    Arrays are `[N, F]` or `[N, T, F]`. Of several in an .npz file, `features`, `X` or `x` is taken, or the one that
    `args.feature_column_names` names; an array `lengths` `[N]` beside it gives the real steps of each padded series.
    Other numbers become float32; float32 of an .npy file is mapped into memory, so the file must stay as it is.

    Args:
        args: Which data, see above; `max_train_samples` and `max_eval_samples` count rows.
        seed: Not negative.
        need_validation: False leaves all validation sources alone.

    Returns:
        The training and the validation dataset; None for the latter unless `need_validation`.

    Raises:
        UsageError: For all that can be wrong with what the user gave: files, columns, splits; a missing, infinite or
            other value that is no float32, a row or step of another width, an empty series. Rows, steps and columns
            are counted from 1, without the header.
    """
    if args.streaming:
        raise UsageError("features are not streamed, for all of them are checked first; leave out --streaming")
    if (args.dataset_name is None) == (args.train_file is None):
        raise UsageError("features come from one source; give either --train_file or --dataset_name")
    splits = {} if args.dataset_name is None else load_named(args)
    if args.train_file is not None:
        train, columns = _load_files("train_file", args, ())
    else:
        train, columns = _load_split(splits, args.dataset_train_split, args, ())

    validation = None
    if need_validation:
        if args.validation_file is not None:
            validation, _ = _load_files("validation_file", args, columns)
        elif splits and (args.dataset_validation_split or "validation" in splits):
            validation, _ = _load_split(splits, args.dataset_validation_split or "validation", args, columns)
        else:
            train, validation = hold_out(train, args.validation_split_percentage, seed)
        shapes = [_wording(dataset.data.schema.field("features").type) for dataset in (train, validation)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the training data hold {shapes[0]} and the validation data {shapes[1]}; give both the same features"
            )

    return first_samples(train, validation, args)


def feature_shape(dataset: Dataset) -> tuple[bool, int]:
    """Whether the rows of the column `features` are series, and F, the numbers of a vector or of a step."""
    shape = np.shape(dataset.with_format("numpy")[0]["features"])
    return len(shape) == 2, shape[-1]


def longest_series(dataset: Dataset) -> int:
    """The steps of the longest series in the column `features`."""
    batches = dataset.select_columns("features").with_format("arrow").iter(BATCH_ROWS)
    chunks = (chunk for batch in batches for chunk in batch.column("features").chunks)
    storages = (chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in chunks)
    return max(int(list_lengths(storage).max(initial=0)) for storage in storages)


def feature_statistics(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of each feature, over all rows and all steps of them.

    Batches are merged in float64 as in Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance",
    so that memory stays constant and a large mean costs no precision; of equal values the deviation is exactly 0.

    Args:
        dataset: Has the column `features`, vectors `[F]` or series `[T, F]`, and at least one row.

    Returns:
        Two float32 `[F]`. The deviation of a feature that never changes is 1, to divide by.
    """
    _, width = feature_shape(dataset)
    row_bytes = max(dataset.data.nbytes // dataset.data.num_rows, 1)
    count, mean, squares = 0, np.zeros(width), np.zeros(width)
    batches = dataset.select_columns("features").with_format("arrow")
    for batch in batches.iter(max(BLOCK_SIZE // row_bytes, 1)):
        for chunk in batch.column("features").chunks:
            values = plain_numbers(chunk).reshape(-1, width).astype(np.float64)
            if not len(values):
                continue
            total = count + len(values)
            chunk_mean = values.mean(axis=0)
            difference = chunk_mean - mean
            squares += np.square(values - chunk_mean).sum(axis=0) + difference**2 * (count * len(values) / total)
            mean += difference * (len(values) / total)
            count = total
    deviation = np.sqrt(squares / count).astype(np.float32)
    return mean.astype(np.float32), np.where(deviation == 0, np.float32(1), deviation)


def _load_files(argument: str, args: DataArguments, columns: tuple[str, ...]) -> tuple[Dataset, tuple[str, ...]]:
    """The rows of the files that `argument` names, and their columns; `columns` are those of earlier data."""
    files = getattr(args, argument)
    paths = find_files(argument, files)
    kinds = sorted({array_kind(path) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"{argument} '{files}' mixes {' and '.join(kinds)} files; give files of one kind")
    chunks: list[pa.Array] = []
    for path in paths:
        with naming_file(path):
            source, blocks = open_feature_file(path, kinds[0], args, columns)
            columns = source.columns
            found = _arrow_chunks(source, blocks)
        # Types are compared by what they say: those of series are equal whatever their width.
        if chunks and _wording(found[0].type) != _wording(chunks[0].type):
            raise UsageError(
                f"{source.name} holds {_wording(found[0].type)} and '{paths[0]}' {_wording(chunks[0].type)}; give "
                "files with the same features"
            )
        chunks += found
    return _to_dataset(chunks, argument.removesuffix("_file")), columns


def _load_split(
    splits: dict[str, Dataset], split: str, args: DataArguments, columns: tuple[str, ...]
) -> tuple[Dataset, tuple[str, ...]]:
    """The rows of one of `splits`, the splits of `args.dataset_name`, and their columns."""
    if split not in splits:
        raise UsageError(f"dataset '{args.dataset_name}' has no split '{split}'; its splits are: {', '.join(splits)}")
    dataset = splits[split]
    # Numbers of classes are no quantities.
    types = {
        field.name: pa.string() if isinstance(dataset.features[field.name], ClassLabel) else field.type
        for field in dataset.features.arrow_schema
    }
    source = choose_columns(types, f"split '{split}' of dataset '{args.dataset_name}'", args, columns)
    tables = dataset.select_columns(list(source.columns)).with_format("arrow").iter(BATCH_ROWS)
    batches = (batch.select(source.columns).columns for table in tables for batch in table.to_batches())
    chunks = _arrow_chunks(source, column_blocks(batches, source))
    return _to_dataset(chunks, split), source.columns


def _arrow_chunks(source: Source, blocks: Iterator[Block]) -> list[pa.Array]:
    """All rows of a source, for a dataset to hold.

    Raises:
        UsageError: There is none, or a number is not finite.
    """
    chunks = []
    rows = 0
    for block in blocks:
        finite = np.isfinite(block.values)
        if not finite.all():
            index, column = divmod(int(finite.argmin()), finite.shape[1])
            row, step = locate(index, block.lengths)
            raise source.misplaced(str(block.values[index, column]), source.place(rows + row, step), column)
        chunks.append(block.to_arrow())
        rows += len(block)
    if not rows:
        raise UsageError(f"{source.name} has no rows; give data with at least one")
    return chunks


def _to_dataset(chunks: list[pa.Array], split: str) -> Dataset:
    table = pa.table({"features": pa.chunked_array(chunks)})
    # Otherwise datasets would hash all the data.
    return Dataset(table, split=NamedSplit(split), fingerprint=generate_random_fingerprint())


def _wording(kind: pa.DataType) -> str:
    if isinstance(kind, pa.ExtensionType):
        return f"series with {kind.shape[1]} numbers a step"
    return f"vectors of {kind.list_size} numbers"
