"""Image datasets from folders, files, or the Hub."""

import os
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
from datasets import Dataset, Features, Image, NamedSplit, Value
from datasets.exceptions import DatasetsError

from ..errors import UsageError
from .arguments import DataArguments
from .file_readers import file_errors_as_usage_error, find_files, open_parquet, single_kind, split_paths
from .image_files import is_image_file, list_images
from .splits import dataset_error_reason, resolve_splits

IMAGE_COLUMNS = ("image", "img")


def load_image_datasets(args: DataArguments, *, seed: int, need_validation: bool) -> tuple[Dataset, Dataset | None]:
    """Load the images to train and to evaluate on, not decoded, in the one column `image`.

    Sources are those of `resolve_splits`. Files are folders, searched recursively and in sorted order (hidden files and
    folders and other files are ignored); image files or globs of them; or Parquet files. Nothing is decoded here, so a
    damaged image is not detected (see `leave_out_unreadable`).

    Args:
        args: Sources and limits. `image_column_name` is the column to read; default: `image`, else
            `img`, else the only column that can hold images.
        seed: Seed of the held-out images, not negative.
        need_validation: False ignores all validation sources.

    Returns:
        The training and the validation dataset, map-style, with rows `{"image": {"bytes": ..., "path": ...}}`, where
        either may be None; None for the validation dataset unless `need_validation`.

    Raises:
        UsageError: Files, columns, names or splits do not exist, cannot be read, or hold no images.
    """
    if args.streaming:
        raise UsageError("Images cannot be streamed. Omit --streaming.")
    return resolve_splits(
        args,
        seed=seed,
        need_validation=need_validation,
        load_files=partial(_load_files, args=args),
        load_split=partial(_load_split, args=args),
    )


def _load_files(argument: str, args: DataArguments) -> Dataset:
    """Load the images of the files that the argument of this name lists."""
    files = getattr(args, argument)
    split = argument.removesuffix("_file")
    paths = list_image_files(argument, files)
    if single_kind(argument, files, map(_kind, paths)) == "parquet":
        return _load_parquet(f"{argument} '{files}'", paths, args, split)
    return _encoded_image_column(Dataset.from_dict({"image": paths}, split=NamedSplit(split)), "image")


def parquet_image_column(argument: str, args: DataArguments) -> str | None:
    """Return the column of images in the Parquet files that the argument of this name lists; None for image files."""
    names = split_paths(getattr(args, argument))
    if any(map(os.path.isdir, names)):
        return None
    path = find_files(argument, names[0])[0]
    if _kind(path) != "parquet":
        return None
    with file_errors_as_usage_error(path), open_parquet(path) as parquet:
        return _choose_column(parquet.schema_arrow, args.image_column_name, f"'{path}'")


def list_image_files(argument: str, files: str) -> list[str]:
    """Return the files, and the images in the folders, that an argument lists."""
    paths: dict[str, None] = {}
    for name in split_paths(files):
        found = list_images(name) if os.path.isdir(name) else find_files(argument, name)
        if not found:
            raise UsageError(
                f"{argument} '{name}' is a folder without images (.png, .jpg and other suffixes that PIL reads). Check "
                f"the path, or name Parquet files, such as '{os.path.join(name, '*.parquet')}'."
            )
        paths |= dict.fromkeys(found)
    return list(paths)


def _kind(path: str) -> str:
    if path.lower().endswith(".parquet"):
        return "parquet"
    if not is_image_file(path):
        raise UsageError(f"'{path}' is not an image. Use .png, .jpg or another suffix that PIL reads, or .parquet.")
    return "image"


def _load_parquet(source: str, paths: list[str], args: DataArguments, split: str) -> Dataset:
    columns: set[str] = set()
    has_structs = False
    num_rows = 0
    for path in paths:
        with file_errors_as_usage_error(path), open_parquet(path) as parquet:
            column = _choose_column(parquet.schema_arrow, args.image_column_name, f"'{path}'")
            columns.add(column)
            has_structs |= pa.types.is_struct(parquet.schema_arrow.field(column).type)
            num_rows += parquet.metadata.num_rows
    if len(columns) > 1:
        raise UsageError(
            f"{source} has images in columns of different names ({', '.join(sorted(columns))}). Provide files of one "
            "kind."
        )
    if num_rows == 0:
        raise UsageError(f"{source} has no rows. Provide a file with images.")
    try:
        dataset = Dataset.from_parquet(
            paths,
            split=NamedSplit(split),
            cache_dir=args.cache_dir,
            columns=[column],
            # Older versions of datasets do not cast large_binary to Image.
            features=Features({column: Image(decode=False) if has_structs else Value("binary")}),
        )
    except DatasetsError as error:
        raise UsageError(f"{source} cannot be read: {dataset_error_reason(error)}. Write the file again.") from None
    return _encoded_image_column(dataset, column)


def _choose_column(schema: pa.Schema, wanted: str | None, source: str) -> str:
    """Return the column to read: the `wanted` one, `image`, `img`, or the only possible one."""
    candidates = [column.name for column in schema if _can_hold_images(column.type)]
    if wanted is None:
        wanted = usual_image_column(candidates)
    if wanted is None or wanted not in candidates:
        problem = f"No column '{wanted}'" if wanted is not None else "Not exactly one column"
        raise UsageError(
            f"{problem} of encoded images in {source}. Set --image_column_name to the column with the images, out of: "
            f"{', '.join(candidates or schema.names)}."
        )
    return wanted


def usual_image_column(candidates: Sequence[str]) -> str | None:
    """Return which of the columns that can hold images is read: `image`, `img`, or the only one."""
    named = [name for name in IMAGE_COLUMNS if name in candidates]
    return named[0] if named else candidates[0] if len(candidates) == 1 else None


def _can_hold_images(kind: pa.DataType) -> bool:
    """Return whether it is a type of encoded images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _load_split(dataset: Dataset, split: str, args: DataArguments) -> Dataset:
    """Load the images of a split of `args.dataset_name`."""
    if len(dataset) == 0:
        raise UsageError(f"Split '{split}' of dataset '{args.dataset_name}' has no rows. Name another split.")
    source = f"dataset '{args.dataset_name}'"
    return _encoded_image_column(dataset, _choose_column(dataset.features.arrow_schema, args.image_column_name, source))


def _encoded_image_column(dataset: Dataset, column: str) -> Dataset:
    """Return only this column, renamed `image`, as `{"bytes": ..., "path": ...}`."""
    dataset = dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    return dataset.cast_column("image", Image(decode=False))
