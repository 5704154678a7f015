"""Options of the commands other than train and masks. Nothing here imports a library that takes seconds."""

import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation.names import POOLINGS
from .console import CommandParser
from .quick_checks import missing_file

# A name that the Hub allows: NAME or USER/NAME.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _model(name: str) -> str:
    if not Path(name).exists() and not _HUB_NAME.fullmatch(name):
        raise ArgumentTypeError(f"{name!r} is neither a directory nor a name on the Hub. Check the path")
    return name


def _files(files: str) -> str:
    missing = missing_file(files)
    if missing is not None:
        raise ArgumentTypeError(f"{missing!r} does not exist. Check the path")
    return files


def _task(source: str) -> str:
    path = Path(source)
    if not path.exists() and (path.suffix or path.is_absolute()):  # otherwise a data set on the Hub
        raise ArgumentTypeError(f"{source!r} does not exist. Check the path")
    return source


def _directory(path: str) -> str:
    if not Path(path).is_dir():
        raise ArgumentTypeError(f"{path!r} is not a directory. Name the output_dir of a run")
    return path


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    number.__name__ = "integer"  # argparse: invalid integer value: 'many'
    return number


_count = _at_least(1)


def _parser(command: str, description: str) -> ArgumentParser:
    return CommandParser(prog=f"jepa-hf {command}", description=description, allow_abbrev=False)


def _add_model_options(parser: ArgumentParser, batch_size: int, items: str, has_revision: bool = True) -> None:
    """Add the options of loading and running models."""
    parser.add_argument(
        "--batch_size", type=_count, default=batch_size, help=f"{items} per batch; default {batch_size}"
    )
    if has_revision:
        parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def _add_max_seq_length(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max_seq_length",
        type=_count,
        help="maximum tokens of a text; longer ones are cut (default: the model's maximum)",
    )


def _add_results_dir(parser: ArgumentParser, default: str) -> None:
    parser.add_argument("--output_dir", default=default, help=f"directory to write to; default {default}")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the results that an earlier command wrote there"
    )


def _evaluate() -> ArgumentParser:
    parser = _parser(
        "evaluate",
        "Compare frozen encoders: linear probe and kNN on labelled samples, Spearman's correlation on scored pairs of "
        "texts, recall on matching pairs, all with 95 % intervals.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        type=_model,
        help="directories or Hub names of encoders; the first is the reference",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        type=_task,
        help="files (csv, tsv, json, jsonl, parquet, npz), folders with train.* and test.* or with images in "
        "folders of their classes, or data sets on the Hub; the columns decide the kind of task: text, image or "
        "features with label; sentence1, sentence2 and score; pairs such as query and document",
    )
    parser.add_argument(
        "--pooling",
        nargs="+",
        default=["mean"],
        choices=POOLINGS,
        metavar="POOLING",
        help=f"any of {', '.join(POOLINGS)}; default mean",
    )
    _add_results_dir(parser, "evaluation")
    parser.add_argument("--text_column_name", help="the column of texts, or first,second of pairs")
    parser.add_argument("--label_column_name", help="the column of labels")
    parser.add_argument("--feature_column_names", help="columns of features, with commas")
    parser.add_argument(
        "--max_train_samples", type=_count, help="maximum number of rows to fit probes on (default: all)"
    )
    parser.add_argument("--max_test_samples", type=_count, help="maximum number of rows to test on (default: all)")
    _add_max_seq_length(parser)
    parser.add_argument(
        "--seed", type=_at_least(0), default=42, help="seed of subsets, splits and intervals; default 42"
    )
    parser.add_argument(
        "--update_card",
        nargs="*",
        metavar="MODEL",
        help="write the results into the README.md of these local models; needs no name if there is one model",
    )
    _add_model_options(parser, 64, "samples", has_revision=False)
    return parser


def _generate() -> ArgumentParser:
    parser = _parser(
        "generate",
        "Generate answers of language models to the prompts in a file, greedily and in batches, and score them. A row "
        "has messages, the last of which is the reference answer, or two columns.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        type=_model,
        help="directories or Hub names of causal language models, or adapters",
    )
    parser.add_argument(
        "--data_file",
        required=True,
        metavar="FILES",
        type=_files,
        help="json, jsonl, csv, tsv or parquet, also with .gz; globs",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["exact_match", "prefix_match"],
        metavar="METRIC",
        help="any of exact_match (equal text), prefix_match (starts with the reference), gsm8k (equal final number), "
        "sql (equal result rows); default exact_match prefix_match",
    )
    parser.add_argument(
        "--database", help="for sql: an SQLite file, or a folder of NAME/NAME.sqlite, chosen by the rows' db_id"
    )
    _add_results_dir(parser, "generation")
    parser.add_argument("--max_new_tokens", type=_count, default=128, help="maximum tokens of an answer; default 128")
    parser.add_argument("--max_samples", type=_count, help="use only the first N rows (default: all)")
    parser.add_argument("--text_column_name", help="column of prompts; default messages if rows have them, else text")
    parser.add_argument(
        "--code_column_name", help="column of reference answers; default messages if rows have them, else code"
    )
    parser.add_argument(
        "--code_turn", type=int, default=-1, help="index of the message that is the answer; default -1, the last"
    )
    parser.add_argument("--tokenizer_name", help="tokenizer (default: the model's)")
    parser.add_argument("--chat_template_path", metavar="FILE", help="chat template (default: the tokenizer's)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; default float32")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    _add_model_options(parser, 16, "prompts")
    return parser


def _export() -> ArgumentParser:
    parser = _parser("export", "Write a checkpoint or a full model as a directory that transformers loads.")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=_directory,
        help="checkpoint-N, out/jepa, or an out/ that contains one; or a language model",
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="directory to write, new or empty")
    parser.add_argument(
        "--encoder",
        choices=("context", "target"),
        help="which encoder; default target for text with a pretrained start, but context with --head or --average and "
        "for everything else",
    )
    parser.add_argument(
        "--average",
        metavar="SHARE",
        type=float,
        help="average with the start: SHARE of the start's weights and 1 - SHARE of the trained ones; 0.5 forgets "
        "little of what a pretrained encoder could do",
    )
    parser.add_argument("--start", metavar="MODEL", help="the encoder that the run started from, for --average")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--head", choices=("mlm",), help="with the masked-language-model head, for AutoModelForMaskedLM")
    kind.add_argument("--onnx", action="store_true", help="the encoder as model.onnx, with dynamic batch and length")
    kind.add_argument(
        "--custom_code", action="store_true", help="the full model and its code, for use without jepa_hf installed"
    )
    return parser


def _report() -> ArgumentParser:
    parser = _parser(
        "report",
        "Write one self-contained HTML page about a run, finished or not: curves with a sentence about each, settings, "
        "versions, and of an encoder masks, probes, spectrum, map and nearest neighbours of the run's samples.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=_directory, help="the output_dir of a run")
    parser.add_argument("--output", metavar="PATH", help="file to write; default RUN_DIR/report.html")
    parser.add_argument(
        "--max_samples",
        metavar="N",
        type=_at_least(2),
        default=1000,
        help="maximum number of the run's samples for spectrum, map and neighbours; default 1000",
    )
    parser.add_argument(
        "--evaluation",
        metavar="PATH",
        type=_files,
        help="results of jepa-hf evaluate; default RUN_DIR/evaluation/evaluation.json if it exists",
    )
    return parser


def _embed() -> ArgumentParser:
    parser = _parser(
        "embed",
        "Embed the rows of files with a frozen encoder. Finished parts are kept in OUTPUT.parts until all are done; "
        "the same command continues after them.",
    )
    parser.add_argument("model", metavar="MODEL", type=_model, help="directory or Hub name of an encoder, or of a JEPA")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        type=_files,
        help="texts: txt, md, json, jsonl, csv, tsv or parquet, also with .gz; images: folders, files or parquet; "
        "features: csv, tsv, json, jsonl, parquet, npy or npz; globs in quotes",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="new .parquet (the rows' other columns, such as labels, and a column of lists, embedding) or .npy (an "
        "array [rows, width])",
    )
    parser.add_argument("--pooling", default="mean", choices=POOLINGS, help="default mean, as in sentence-transformers")
    _add_max_seq_length(parser)
    parser.add_argument("--max_samples", type=_count, help="number of rows to embed, from the start (default: all)")
    parser.add_argument("--text_column_name", help="column of texts; default text, else the only column of strings")
    parser.add_argument("--image_column_name", help="column of images; default image, img, or the only such column")
    parser.add_argument(
        "--feature_column_names", help="columns of features, with commas; default: all of numbers, or the only of lists"
    )
    parser.add_argument("--label_column_name", help="column to exclude from the features")
    _add_model_options(parser, 64, "rows")
    return parser


def _push() -> ArgumentParser:
    parser = _parser(
        "push",
        "Push the result of a run to the Hub, in one commit: the plain encoder at the repository's root, the full "
        "model under jepa/, and tokenizer, card, metrics.json and pictures. Checkpoints, settings, masks.png and "
        "report.html stay here: the last three show paths and samples of the data.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=_directory, help="output_dir of a run or of jepa-hf export")
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch; created if it does not exist")
    parser.add_argument("--tag", metavar="NAME", help="tag the new commit, for example v1.0")
    parser.add_argument("--token", help="default: HF_TOKEN or that of `hf auth login`, which no process list shows")
    parser.add_argument(
        "--commit_message", metavar="TEXT", default="Push of a jepa_hf run", help="message of the commit"
    )
    return parser


# Parser of each command. The module of the same name has the work: `run(options) -> int | None`, the exit code.
PARSERS: dict[str, Callable[[], Any]] = {
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "report": _report,
    "embed": _embed,
    "push": _push,
}
