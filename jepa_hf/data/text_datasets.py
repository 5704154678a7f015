"""Where text comes from: files, a dataset on the Hub, or the reference prose that ships with Python."""

import codecs
import csv
import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pydoc_data.topics import topics
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, NamedSplit, Value, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import logging as hub_logging
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizerFast

from ..errors import UsageError

_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_STRING_TYPES = ("string", "large_string", "string_view")
_FEATURES = Features({"text": Value("string")})
_SAMPLE_SIZE = 1000
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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


def load_text_datasets(
    args: DataArguments, *, seed: int, need_validation: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Load the texts to train and to evaluate on, each dataset with the one column `text` and no blank rows.

    Texts to train on come from `args.train_file` or `args.dataset_name`, without either from `embedded_corpus`. Texts
    to evaluate on come from `args.validation_file`, else from the validation split of `args.dataset_name`, else
    `args.validation_split_percentage` of the training texts (at least one, and not all) are set apart, the same ones
    for the same `seed`; the rest keeps its order.

    Files that are not streamed are read once as a check before anything is written to the cache. Null texts count as
    blank. Lone surrogates, which JSON can spell, become U+FFFD.

    Args:
        args: Their `streaming` decides whether datasets are map-style or iterable.
        seed: Not negative.
        need_validation: False leaves all validation sources alone.

    Returns:
        The training and the validation dataset; None for the latter unless `need_validation`.

    Raises:
        UsageError: For all that can be wrong with what the user gave: files, columns, names, splits. Of a streamed
            file only what comes before its first text is looked at here, the rest when it is read.
    """
    if args.dataset_name is not None and args.train_file is not None:
        raise UsageError("dataset_name and train_file exclude each other; give only one of them")
    splits = {} if args.dataset_name is None else load_named(args)
    if args.dataset_name is not None:
        train = _pick_split(splits, args.dataset_train_split, args)
    elif args.train_file is not None:
        train = _load_files("train_file", args.train_file, args, "train")
    else:
        train = Dataset.from_dict({"text": embedded_corpus()})
        train = train.to_iterable_dataset() if args.streaming else train

    validation = None
    if need_validation:
        if args.validation_file is not None:
            validation = _load_files("validation_file", args.validation_file, args, "validation")
        elif splits and (args.dataset_validation_split or "validation" in splits):
            validation = _pick_split(splits, args.dataset_validation_split or "validation", args)
        elif args.streaming:
            raise UsageError("streamed texts cannot be split; give --validation_file to evaluate on")
        else:
            train, validation = hold_out(train, args.validation_split_percentage, seed)

    return first_samples(train, validation, args)


def embedded_corpus() -> list[str]:
    """About 260 KB of English: the paragraphs of Python's own language reference, as `help()` shows it.

    Whitespace is normalized; headings, grammar, code, paragraphs shorter than 40 characters and repetitions are left
    out. The texts are the same in every call but differ a little between Python versions.
    """
    paragraphs = (" ".join(part.split()) for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
    return [
        paragraph
        for paragraph in dict.fromkeys(paragraphs)
        if len(paragraph) >= 40
        # Prose ends like a sentence, or like one that introduces an example.
        and paragraph.endswith((".", ":", "!", "?"))
        and not paragraph.endswith("...")
        and ">>>" not in paragraph
        and "::=" not in paragraph
    ]


def train_wordpiece_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, model_max_length: int = 512
) -> BertTokenizerFast:
    """Train a lower-casing BERT tokenizer; equal texts give equal tokenizers.

    Args:
        texts: What to learn the vocabulary from; read once and kept in memory meanwhile.
        vocab_size: Most tokens, special tokens included. All characters of `texts` are kept, even if they are more;
            texts with few different words give fewer.
        model_max_length: Stored in the tokenizer, in tokens.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    continuations: set[str] = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            continuations.update(word[1:])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The trainer numbers continuations as it meets them, in a random order that also decides between equally good
        # merges. Those that are there from the start keep their numbers.
        special_tokens=[*_SPECIAL_TOKENS, *(f"##{character}" for character in sorted(continuations))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return BertTokenizerFast(vocab=dict(vocab), model_max_length=model_max_length)


@dataclass(frozen=True)
class _TextFile:
    """A file and the column to read. `version` changes with the file, so that the cache tells its versions apart."""

    path: str
    kind: str
    column: str
    version: tuple[str, int, int]


def _load_files(argument: str, files: str, args: DataArguments, split: str) -> Dataset | IterableDataset:
    """The texts of `files`, the value of the argument named `argument`."""
    paths = find_files(argument, files)
    kinds = sorted({file_kind(path) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"{argument} '{files}' mixes {' and '.join(kinds)} files; give files of one kind")
    text_files = [_describe(argument, path, kinds[0], args.text_column_name) for path in paths]
    texts = _read_texts(text_files)
    if next(texts, None) is None:
        raise UsageError(f"{argument} '{files}' holds no text, only blank rows; give a file with text")
    reading: dict[str, Any] = {"gen_kwargs": {"files": text_files}, "split": NamedSplit(split)}
    if args.streaming:
        return IterableDataset.from_generator(_read_texts, features=_FEATURES, **reading)
    deque(texts, maxlen=0)  # reads all the rest, for its errors
    return Dataset.from_generator(_read_texts, cache_dir=args.cache_dir, **reading)


def find_files(argument: str, files: str) -> list[str]:
    """The paths that a path, a glob, or several of them separated by commas stand for; globs sorted."""
    paths: dict[str, None] = {}
    for pattern in [files] if os.path.exists(files) else map(str.strip, files.split(",")):
        if os.path.isdir(pattern):
            raise UsageError(f"{argument} '{pattern}' is a directory; name its files, such as '{pattern}/*.txt'")
        if os.path.exists(pattern):
            found = [pattern]
        else:
            found = sorted(path for path in glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            problem = "matches no file" if any(magic in pattern for magic in "*?[") else "does not exist"
            raise UsageError(f"{argument} '{pattern}' {problem}; check the path")
        paths |= dict.fromkeys(found)
    return list(paths)


def file_kind(path: str) -> str:
    """The kind of file that an ending stands for."""
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if ending not in _KINDS:
        raise UsageError(
            f"'{path}' has the unknown ending '{ending}'; known are {', '.join(_KINDS)}, each also followed by .gz"
        )
    return _KINDS[ending]


def _describe(argument: str, path: str, kind: str, text_column_name: str | None) -> _TextFile:
    status = os.stat(path)
    if status.st_size == 0:
        raise UsageError(f"{argument} '{path}' is empty; give a file with text")
    column = text_column(path, kind, text_column_name)
    return _TextFile(path, kind, column, (os.path.abspath(path), status.st_size, status.st_mtime_ns))


def text_column(path: str, kind: str, wanted: str | None) -> str:
    """The column of a file that holds its texts: the `wanted` one, else `text`, else the only one of strings."""
    with naming_file(path):
        return _choose_column(_column_types(path, kind), wanted, f"'{path}'")


def _choose_column(types: dict[str, str], wanted: str | None, source: str) -> str:
    """The column to read: the `wanted` one, else `text`, else the only one that holds strings.

    Args:
        types: The type of each column by its name.
        source: What has the columns, as an error is to call it.
    """
    strings = [name for name, kind in types.items() if kind in _STRING_TYPES]
    if wanted is None and "text" not in types and len(strings) == 1:
        return strings[0]
    name = wanted or "text"
    if name not in types:
        raise UsageError(
            f"{source} has no column '{name}'; name the column with the text by --text_column_name, out of: "
            f"{', '.join(types)}"
        )
    if types[name] not in (*_STRING_TYPES, "null"):
        raise UsageError(
            f"column '{name}' of {source} holds {types[name]}, not strings; name the column with the text by "
            f"--text_column_name, out of: {', '.join(types)}"
        )
    return name


def _column_types(path: str, kind: str) -> dict[str, str]:
    """The type of each column by its name, "string" for text, as far as the first rows show it."""
    if kind == "text":
        return {"text": "string"}
    if kind == "parquet":
        with open_parquet(path) as parquet:
            return {column.name: str(column.type) for column in parquet.schema_arrow}
    type_of = _csv_type if kind in ("csv", "tsv") else _json_type
    types: dict[str, str] = {}
    for row in islice(read_rows(path, kind), _SAMPLE_SIZE):
        for name, value in row.items():
            # One string makes a column of strings: in CSV the others only look like numbers.
            if types.get(name, "null") != "string":
                types[name] = types.get(name, "null") if value in (None, "") else type_of(value)
    if not types:
        raise UsageError(f"'{path}' has no rows; give a file with text")
    return types


def _csv_type(value: str) -> str:
    for number in (int, float):
        try:
            number(value)
        except ValueError:
            continue
        return number.__name__
    return "string"


def _json_type(value: Any) -> str:
    return "string" if isinstance(value, str) else type(value).__name__


def _read_texts(files: list[_TextFile]) -> Iterator[dict[str, str]]:
    """The texts of all files that are not blank, one by one."""
    for file in files:
        with naming_file(file.path):
            for number, row in enumerate(read_rows(file.path, file.kind, file.column), 1):
                text = row.get(file.column)
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise UsageError(
                        f"row {number} of '{file.path}' has {type(text).__name__} in column '{file.column}', which "
                        "must hold strings"
                    )
                if text.strip():
                    yield {"text": well_formed(text)}


def read_rows(path: str, kind: str, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file. Rows of parquet files hold only `column`, if given."""
    match kind:
        case "text":
            return _read_lines(path)
        case "json":
            return _read_json(path)
        case "csv":
            return _read_csv(path, ",")
        case "tsv":
            return _read_csv(path, "\t")
        case _:
            return _read_parquet(path, column)


def _read_lines(path: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for line in file:
            yield {"text": line.rstrip("\n")}


def _read_json(path: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines or of one JSON array. The latter is read whole."""
    with open_text(path) as file:
        is_array = next(filter(str.strip, file), "").lstrip().startswith("[")
        file.seek(0)
        for number, document in [(1, file.read())] if is_array else enumerate(file, 1):
            if not document.strip():
                continue
            try:
                rows = json.loads(document.rstrip())
            except json.JSONDecodeError as error:
                line = number + error.lineno - 1
                raise UsageError(f"line {line} of '{path}' is not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:  # a huge number, a deep nesting
                raise UsageError(f"line {number} of '{path}' cannot be read as JSON: {error}") from None
            for row in rows if is_array else [rows]:
                if not isinstance(row, dict):
                    raise UsageError(f"line {number} of '{path}' has {_json_type(row)} where an object is expected")
                yield row


def _read_csv(path: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if len(row) > len(header):
                    raise UsageError(
                        f"line {reader.line_num} of '{path}' has {len(row)} values for {len(header)} columns; put "
                        "double quotes around values that hold the separator"
                    )
                yield dict(zip(header, row, strict=False))
        except csv.Error as error:
            raise UsageError(f"line {reader.line_num} of '{path}' is not valid CSV: {error}") from None


def _read_parquet(path: str, column: str | None) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as parquet:
        for batch in parquet.iter_batches(_SAMPLE_SIZE, columns=column and [column]):
            yield from batch.to_pylist()


def is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def open_text(path: str, newline: str | None = None) -> IO[str]:
    opener = gzip.open if is_gzip(path) else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def open_bytes(path: str) -> IO[bytes]:
    return gzip.open(path) if is_gzip(path) else open(path, "rb")


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with open_bytes(path) as file, tempfile.TemporaryFile() as unpacked:
            if is_gzip(path):
                # Parquet is read from its end, which gzip cannot find.
                shutil.copyfileobj(file, unpacked)
                file = unpacked
            with pq.ParquetFile(file) as parquet:
                yield parquet
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"'{path}' is not a valid Parquet file: {reason}") from None


@contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Make what can go wrong while reading the file at `path` a `UsageError` that names it."""
    try:
        try:
            yield
        except ValueError:  # a UsageError too
            if is_gzip(path):
                # Damage that gzip notices only at the end of the file first unpacks to nonsense.
                with open_bytes(path) as file:
                    while file.read(2**20):
                        pass
            raise
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' is not UTF-8 at byte {_first_bad_byte(path)}; convert it to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"'{path}' is not a whole gzip file: {error}") from None
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UsageError(f"'{path}' cannot be read: {reason}; restore it, or name another file") from None


def _first_bad_byte(path: str) -> int:
    """The offset of the first byte that is not UTF-8, counted in the unpacked file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_bytes(path) as file:
        while True:
            chunk = file.read(2**20)
            begun = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return offset - begun + error.start
            offset += len(chunk)


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which UTF-8 has no bytes for, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def load_named(args: DataArguments) -> dict[str, Dataset | IterableDataset]:
    """All splits of `args.dataset_name`."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the client reports every retry
    try:
        return load_dataset(
            args.dataset_name,
            args.dataset_config_name,
            streaming=args.streaming,
            cache_dir=args.cache_dir,
            token=args.token,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # Generating a dataset reports only that it failed; the cause says why.
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason:
            reason = "the Hub cannot be reached"
        raise UsageError(
            f"dataset_name '{args.dataset_name}' cannot be loaded: {reason}; give another one, or local files by "
            "--train_file"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def _pick_split(
    splits: dict[str, Dataset | IterableDataset], split: str, args: DataArguments
) -> Dataset | IterableDataset:
    """The texts of one of `splits`, the splits of `args.dataset_name`."""
    source = f"dataset '{args.dataset_name}'"
    if split not in splits:
        raise UsageError(f"{source} has no split '{split}'; its splits are: {', '.join(splits)}")
    dataset = splits[split]
    if dataset.features is None:
        types = {name: _json_type(value) for name, value in next(iter(dataset), {}).items()}
    else:
        types = {
            name: kind.dtype if isinstance(kind, Value) else type(kind).__name__
            for name, kind in dataset.features.items()
        }
    column = _choose_column(types, args.text_column_name, source)
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    if isinstance(dataset, IterableDataset):
        # Streams forget their features on the way.
        return dataset.filter(_has_text, batched=True).cast(_FEATURES)
    dataset = dataset.filter(
        _has_text, batched=True, load_from_cache_file=not args.overwrite_cache, desc="Dropping blank rows"
    )
    if len(dataset) == 0:
        raise UsageError(f"split '{split}' of {source} holds no text in column '{column}'; give another split")
    return dataset


def _has_text(batch: dict[str, list[str | None]]) -> list[bool]:
    return [text is not None and not text.isspace() and text != "" for text in batch["text"]]


def hold_out(dataset: Dataset, percentage: int, seed: int) -> tuple[Dataset, Dataset]:
    """Set `percentage` % of the rows apart, chosen by `seed`; both parts keep the order, which `concat` reads in."""
    if len(dataset) < 2:
        raise UsageError(
            "a single row cannot be split into training and validation; give more data or --validation_file"
        )
    size = min(max(round(len(dataset) * percentage / 100), 1), len(dataset) - 1)
    held_out = np.zeros(len(dataset), dtype=bool)
    held_out[np.random.default_rng(seed).choice(len(dataset), size, replace=False)] = True
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def first_samples(
    train: Dataset | IterableDataset, validation: Dataset | IterableDataset | None, args: DataArguments
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Both datasets, cut to `args.max_train_samples` and `args.max_eval_samples` rows."""
    if args.max_train_samples is not None:
        train = first_rows(train, args.max_train_samples)
    if args.max_eval_samples is not None and validation is not None:
        validation = first_rows(validation, args.max_eval_samples)
    return train, validation


def first_rows(dataset: Dataset | IterableDataset, size: int) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.take(size)
    return dataset.select(range(min(size, len(dataset))))
