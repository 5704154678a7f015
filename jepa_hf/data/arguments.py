"""`BaseDataArguments` and `DataArguments`: the data of a run."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UsageError
from ..utils.flags import MayChange, flag

# Stands for the name of a data set that was passed from Python, see `BaseDataArguments.splits`.
PASSED_DATASET = "(passed from Python)"


def check_at_least_one(args: Any, *names: str) -> None:
    """Raise a `UsageError` if an attribute of one of these names is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}. Omit it for no limit.")


def check_row_modes(stride: int | None, concat: bool, packed: bool, line_by_line: bool = False) -> None:
    """Raise a `UsageError` if two of the ways to make rows of texts are chosen; `stride` is by line."""
    is_stride = stride is not None and not line_by_line
    chosen = {"line_by_line": line_by_line, "concat": concat, "packed": packed, "stride": is_stride}
    names = [name for name, is_chosen in chosen.items() if is_chosen]
    if len(names) > 1:
        raise UsageError(f"{names[0]} and {names[1]} exclude each other. Set only one of them.")


@dataclass
class BaseDataArguments:
    """Sources of training and validation rows, for every objective.

    Raises:
        UsageError: A number is out of range.
    """

    # Data sets passed from Python, by split: set on an instance, and no field, because fields are flags.
    splits: ClassVar[dict[str, Any] | None] = None

    dataset_name: str | None = flag(None, "Dataset on the Hub, or local directory that load_dataset can load.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    dataset_train_split: str = flag("train", "Split of the dataset to train on.")
    dataset_validation_split: str | None = flag(
        None, "Split of the dataset to evaluate on. Default: validation, if the dataset has it."
    )
    train_file: str | None = flag(None, "Files to train on: a path, a glob, or several separated by commas.")
    validation_file: str | None = flag(None, "Files to evaluate on, in the form of train_file.")
    max_train_samples: int | None = flag(
        None, "Maximum number of training samples, taken from the start (default: all)."
    )
    max_eval_samples: int | None = flag(
        None, "Maximum number of validation samples, taken from the start (default: all)."
    )
    validation_split_percentage: int = flag(
        5, "Percentage of the training rows to evaluate on if there is no other validation data."
    )
    cache_dir: MayChange[str | None] = flag(None, "Cache directory of datasets and models.")
    token: MayChange[str | None] = flag(None, "Token for private datasets and models on the Hub.")

    def __post_init__(self) -> None:
        if not 1 <= self.validation_split_percentage <= 99:
            raise UsageError(
                f"validation_split_percentage must be from 1 to 99, not {self.validation_split_percentage}."
            )
        check_at_least_one(self, "max_train_samples", "max_eval_samples")


@dataclass
class DataArguments(BaseDataArguments):
    """Data of a JEPA run, and the conversion of texts to rows of tokens.

    Raises:
        UsageError: Not exactly one of the three modes is chosen, or a number is out of range.
    """

    train_file: str | None = flag(
        None,
        "Files to train on: txt, text, md, json, jsonl, csv, tsv or parquet, also with .gz; a glob, or "
        "several separated by commas. Features: csv, tsv, json, jsonl, parquet, npy or npz. Images: a folder, a "
        "glob, or parquet.",
    )
    streaming: bool = flag(False, "Read the data during training instead of in advance.")
    text_column_name: str | None = flag(None, "Column with the text. Default: text, else the only column of strings.")
    image_column_name: str | None = flag(None, "Column with the images. Default: image, img, or the only such column.")
    feature_column_names: str | None = flag(
        None, "Columns of features, separated by commas. Default: all numeric columns, or the only one of lists."
    )
    label_column_name: str | None = flag(None, "Column to exclude when all numeric columns are features.")
    probe_task: MayChange[str | None] = flag(
        None,
        "Labelled samples (a file, a folder with train.* and test.* or with images in folders of their "
        "classes, or a dataset) to probe the frozen encoder with at each evaluation: eval_probe_linear, "
        "eval_probe_knn.",
    )
    max_seq_length: int | None = flag(
        None, "Maximum tokens per row, special tokens included. Default: the model's maximum."
    )
    stride: int | None = flag(
        None, "Split long texts into rows that overlap by this many tokens instead of truncating them."
    )
    line_by_line: bool | None = flag(None, "One row per text. The default mode.")
    concat: bool = flag(False, "Concatenate all texts and split them into rows of max_seq_length.")
    packed: bool = flag(
        False,
        "Pack several complete texts into a row of max_seq_length. Each is masked, encoded and predicted "
        "as in a row of its own.",
    )
    pad_to_max_length: bool = flag(False, "Pad to max_seq_length instead of the longest row of a batch.")
    pad_to_multiple_of: int | None = flag(None, "Pad to a multiple of this many tokens.")
    preprocessing_num_workers: MayChange[int | None] = flag(None, "Processes for tokenization.")
    overwrite_cache: MayChange[bool] = flag(False, "Tokenize again instead of using the cache.")

    def __post_init__(self) -> None:
        check_row_modes(self.stride, self.concat, self.packed, bool(self.line_by_line))
        if self.line_by_line is False and not (self.concat or self.packed):
            raise UsageError("line_by_line is off and no other mode is chosen. Set --concat or --packed.")
        super().__post_init__()
        check_at_least_one(self, "max_seq_length", "pad_to_multiple_of", "preprocessing_num_workers")
        if self.stride is not None and not 0 <= self.stride < (self.max_seq_length or math.inf):
            at_most = "" if self.max_seq_length is None else f" and below max_seq_length {self.max_seq_length}"
            raise UsageError(f"stride must be at least 0{at_most}, not {self.stride}.")
