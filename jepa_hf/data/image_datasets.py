"""Where images come from: a folder, files, or a dataset on the Hub."""

import os
from glob import escape, glob

import pyarrow as pa
from datasets import Dataset, Features, Image, NamedSplit, Value
from datasets.exceptions import DatasetsError

from ..errors import UsageError
from .arguments import DataArguments
from .file_readers import find_files, naming_file, open_parquet
from .splits import first_samples, hold_out, load_named

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


def load_image_datasets(args: DataArguments, *, seed: int, need_validation: bool) -> tuple[Dataset, Dataset | None]:
    """Load the images to train and to evaluate on, each dataset with the one column `image`, not decoded.

    Images to train on come from `args.train_file` or `args.dataset_name`. Files are folders, searched with all folders
    below them and in sorted order (hidden files and folders, and files that are no images, are left out); image files
    or globs of them; or parquet files. Images to evaluate on come from `args.validation_file`, else from the validation
    split of `args.dataset_name`, else `args.validation_split_percentage` of the training images (at least one, and not
    all) are set apart, the same ones for the same `seed`; the rest keeps its order.

    Nothing is decoded here, so a damaged image is not noticed; the collator skips it.

    Args:
        args: Their `image_column_name` is the column to read; without it, `image`, else `img`, else the only column
            that can hold images.
        seed: Not negative.
        need_validation: False leaves all validation sources alone.

    Returns:
        The training and the validation dataset, map-style, with rows `{"image": {"bytes": ..., "path": ...}}`, where
        either may be None; None for the validation dataset unless `need_validation`.

    Raises:
        UsageError: For all that can be wrong with what the user gave: files, columns, names, splits.
    """
    if args.streaming:
        raise UsageError("images cannot be streamed; leave out --streaming")
    if args.dataset_name is not None and args.train_file is not None:
        raise UsageError("dataset_name and train_file exclude each other; give only one of them")
    if args.dataset_name is None and args.train_file is None:
        raise UsageError("there are no images to train on; give a folder by --train_file, or --dataset_name")
    splits = {} if args.dataset_name is None else load_named(args)
    if args.dataset_name is not None:
        train = _pick_split(splits, args.dataset_train_split, args)
    else:
        train = _load_files("train_file", args.train_file, args, "train")

    validation = None
    if need_validation:
        if args.validation_file is not None:
            validation = _load_files("validation_file", args.validation_file, args, "validation")
        elif splits and (args.dataset_validation_split or "validation" in splits):
            validation = _pick_split(splits, args.dataset_validation_split or "validation", args)
        else:
            train, validation = hold_out(train, args.validation_split_percentage, seed)

    return first_samples(train, validation, args)


def _load_files(argument: str, files: str, args: DataArguments, split: str) -> Dataset:
    """The images of `files`, the value of the argument named `argument`."""
    paths: dict[str, None] = {}
    for name in [files] if os.path.exists(files) else map(str.strip, files.split(",")):
        paths |= dict.fromkeys(_images_in(argument, name) if os.path.isdir(name) else find_files(argument, name))
    kinds = sorted({_kind(path) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"{argument} '{files}' mixes {' and '.join(kinds)} files; give files of one kind")
    if kinds == ["parquet"]:
        return _load_parquet(f"{argument} '{files}'", list(paths), args, split)
    return _undecoded(Dataset.from_dict({"image": list(paths)}, split=NamedSplit(split)), "image")


def _images_in(argument: str, folder: str) -> list[str]:
    """The paths of all images in a folder and those below it, sorted."""
    paths = glob(os.path.join(escape(folder), "**", "*"), recursive=True)
    found = sorted(path for path in paths if path.lower().endswith(IMAGE_ENDINGS) and os.path.isfile(path))
    if not found:
        raise UsageError(
            f"{argument} '{folder}' is a folder without images ({', '.join(IMAGE_ENDINGS)}); check the path, or name "
            f"parquet files, such as '{os.path.join(folder, '*.parquet')}'"
        )
    return found


def _kind(path: str) -> str:
    ending = os.path.splitext(path.lower())[1]
    if ending not in (*IMAGE_ENDINGS, ".parquet"):
        raise UsageError(f"'{path}' is no image: known endings are {', '.join(IMAGE_ENDINGS)} and .parquet")
    return "parquet" if ending == ".parquet" else "image"


def _load_parquet(source: str, paths: list[str], args: DataArguments, split: str) -> Dataset:
    columns: set[str] = set()
    structs = False
    rows = 0
    for path in paths:
        with naming_file(path), open_parquet(path) as parquet:
            column = _choose_column(parquet.schema_arrow, args.image_column_name, f"'{path}'")
            columns.add(column)
            structs |= pa.types.is_struct(parquet.schema_arrow.field(column).type)
            rows += parquet.metadata.num_rows
    if len(columns) > 1:
        raise UsageError(
            f"{source} has images in columns of different names ({', '.join(sorted(columns))}); give files of one kind"
        )
    if rows == 0:
        raise UsageError(f"{source} has no rows; give a file with images")
    try:
        dataset = Dataset.from_parquet(
            paths,
            split=NamedSplit(split),
            cache_dir=args.cache_dir,
            columns=[column],
            # Older versions of datasets do not make images of large_binary.
            features=Features({column: Image(decode=False) if structs else Value("binary")}),
        )
    except DatasetsError as error:
        # Generating a dataset reports only that it failed; the cause says why.
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise UsageError(f"{source} cannot be read: {reason}; write the file anew") from None
    return _undecoded(dataset, column)


def _choose_column(schema: pa.Schema, wanted: str | None, source: str) -> str:
    """The column to read: the `wanted` one, else `image`, else `img`, else the only one that can hold images.

    Args:
        source: What has the columns, as an error is to call it.
    """
    fitting = [column.name for column in schema if _can_hold_images(column.type)]
    if wanted is None:
        wanted = next((name for name in ("image", "img") if name in fitting), None)
        if wanted is None and len(fitting) == 1:
            wanted = fitting[0]
    if wanted not in fitting:
        problem = f"column '{wanted}'" if wanted is not None else "one column"
        raise UsageError(
            f"{source} has no {problem} of encoded images; name the column with the images by --image_column_name, "
            f"out of: {', '.join(fitting or schema.names)}"
        )
    return wanted


def _can_hold_images(kind: pa.DataType) -> bool:
    """Whether it is that of encoded images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _pick_split(splits: dict[str, Dataset], split: str, args: DataArguments) -> Dataset:
    """The images of one of `splits`, the splits of `args.dataset_name`."""
    source = f"dataset '{args.dataset_name}'"
    if split not in splits:
        raise UsageError(f"{source} has no split '{split}'; its splits are: {', '.join(splits)}")
    dataset = splits[split]
    if len(dataset) == 0:
        raise UsageError(f"split '{split}' of {source} has no rows; give another split")
    return _undecoded(dataset, _choose_column(dataset.features.arrow_schema, args.image_column_name, source))


def _undecoded(dataset: Dataset, column: str) -> Dataset:
    """Only this column, called `image`, as `{"bytes": ..., "path": ...}`."""
    dataset = dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    return dataset.cast_column("image", Image(decode=False))
