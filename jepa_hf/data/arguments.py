"""`DataArguments`: which data a run reads."""

from dataclasses import dataclass, field

from ..errors import UsageError


@dataclass
class DataArguments:
    """What to train on and how texts become rows of tokens.

    Raises:
        UsageError: more or less than one of the three modes is chosen, or a number is out of range.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the Hub, or a local directory that load_dataset can load."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split of the dataset to train on."})
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "The split of the dataset to evaluate on. Default: validation, if the dataset has it."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training instead of beforehand."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Files to train on: txt, text, md, json, jsonl, csv, tsv or parquet, also with .gz; a glob, or "
            "several separated by commas. Features: csv, tsv, json, jsonl, parquet, npy or npz. Images: a folder, a "
            "glob, or parquet."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Files to evaluate on, as train_file."})
    text_column_name: str | None = field(
        default=None, metadata={"help": "The column with the text. Default: text, else the only column of strings."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column with the images. Default: image, img, or the only such column."}
    )
    feature_column_names: str | None = field(
        default=None,
        metadata={"help": "Columns of features, with commas; default all numbers, or the one column of lists."},
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "A column that is no feature, where all numeric columns are taken."}
    )
    probe_task: str | None = field(
        default=None,
        metadata={
            "help": "Labelled samples (a file, a folder with train.* and test.*, or a data set) to judge the frozen "
            "encoder on at each evaluation: eval_probe_linear, eval_probe_knn."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens in a row, special tokens included. Default: what the model takes."},
    )
    stride: int | None = field(
        default=None,
        metadata={"help": "Divide long texts into rows that overlap by this many tokens instead of cutting them."},
    )
    line_by_line: bool | None = field(default=None, metadata={"help": "Make one row of each text. The default mode."})
    concat: bool = field(
        default=False, metadata={"help": "Join all texts and divide them into rows of max_seq_length."}
    )
    packed: bool = field(
        default=False,
        metadata={
            "help": "Put several texts, each whole, into a row of max_seq_length; each is masked, read and predicted "
            "as in a row of its own."
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length instead of to the longest row of a batch."}
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad to a multiple of this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many texts only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many texts."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes to tokenize with."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Do not take tokenized data from the cache."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "How many %% of the training texts to evaluate on if there are no others."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to cache datasets."})
    token: str | None = field(default=None, metadata={"help": "Token for private datasets on the Hub."})

    def __post_init__(self) -> None:
        modes = [name for name in ("line_by_line", "concat", "packed") if getattr(self, name)]
        if len(modes) > 1:
            raise UsageError(f"{modes[0]} and {modes[1]} exclude each other; give only one of them")
        if self.line_by_line is False and not modes:
            raise UsageError("line_by_line is switched off and no other mode chosen; give --concat or --packed")
        if self.packed and self.stride is not None:
            raise UsageError("packed keeps each text in one row and does not go with stride; give only one of them")
        if not 1 <= self.validation_split_percentage <= 99:
            raise UsageError(
                f"validation_split_percentage must be from 1 to 99, and {self.validation_split_percentage} is not"
            )
        for name in ("pad_to_multiple_of", "max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, and {value} is not; leave it out for no limit")
