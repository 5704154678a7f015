"""`jepa-hf generate`: what language models answer to the rows of a file, and how much of it is right."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..llm_jepa import PairedViewTokenizer
from ..llm_jepa.answer_scoring import scorer, share_interval
from ..llm_jepa.generation import judge
from ..llm_jepa.paired_data import PairedDataArguments, PairedRow, load_file_rows
from ..training.run_directory import versions
from ..utils.atomic_files import whole_files
from ..utils.markdown import escaped, table
from .console import complain, quiet_libraries
from .language_model_loading import dtype_of, load_answering_model, load_words
from .parsing import CommandParser, output_folder

PREDICTIONS, RESULTS = "predictions.jsonl", "generation.json"


def main(argv: Sequence[str]) -> int:
    """Generate and judge; returns the exit code."""
    quiet_libraries()
    try:
        _run(_parser().parse_args(argv))
    except UsageError as error:
        return complain("jepa-hf generate", error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf generate",
        description="Have language models answer the prompts of a file's rows, greedily and in batches, and judge the "
        "answers. Rows hold messages, of which the last is the right answer, or two columns.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="directories or Hub names of causal language models, or adapters"
    )
    parser.add_argument(
        "--data_file", required=True, metavar="FILES", help="json, jsonl, csv, tsv or parquet, also with .gz; globs"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["exact_match", "prefix_match"],
        metavar="METRIC",
        help="out of exact_match (the same text), prefix_match (it begins with the right one), gsm8k (the same final "
        "number), sql (the same rows of a database); default exact_match prefix_match",
    )
    parser.add_argument("--database", help="of sql: an SQLite file, or a folder of NAME/NAME.sqlite for rows' db_id")
    parser.add_argument("--output_dir", default="generation", help="where to write; default generation")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most tokens of an answer; default 128")
    parser.add_argument("--max_samples", type=int, help="answer the first so many rows")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at once; default 16")
    parser.add_argument("--text_column_name", help="the column to ask; default messages where rows have them, or text")
    parser.add_argument("--code_column_name", help="the column of right answers; default messages, or code")
    parser.add_argument("--code_turn", type=int, default=-1, help="which message is the answer; default -1, the last")
    parser.add_argument("--tokenizer_name", help="tokenizer, where it is not the model's")
    parser.add_argument("--chat_template_path", metavar="FILE", help="a chat template in place of the tokenizer's")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; default float32")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the models on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that a model brings")
    return parser


def _run(options: argparse.Namespace) -> None:
    """Check everything, answer, write."""
    folder = _checked(options)
    columns = {name: getattr(options, name) for name in ("text_column_name", "code_column_name")}
    data = PairedDataArguments(**columns)
    rows = load_file_rows("data_file", options.data_file, data)[: options.max_samples]
    results: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    for name in options.models:
        shares, found = _answers(name, rows, data, options)
        results[name] = {metric: share_interval(share, len(rows)) for metric, share in shares.items()}
        predictions += [{"model": name, **answer} for answer in found]
    settings = {**vars(options), "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    content = {"rows": len(rows), "results": results, "settings": settings}
    with whole_files(folder) as new:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in predictions)
        (new / PREDICTIONS).write_text(lines, encoding="utf-8")
        (new / RESULTS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(_table(results, options.metrics, len(rows)))
    print(f"\nwritten to {folder}: {PREDICTIONS}, {RESULTS}")


def _answers(
    name: str, rows: Sequence[PairedRow], data: PairedDataArguments, options: argparse.Namespace
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The share of right answers by metric, and each row's answer."""
    kwargs = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    tokenizer = load_words(
        *(("tokenizer_name", options.tokenizer_name) if options.tokenizer_name else ("MODEL", name)),
        kwargs,
        options.chat_template_path,
    )
    views = PairedViewTokenizer(
        tokenizer, text_turn=options.code_turn, code_turn=options.code_turn, num_predictor_tokens=0, **data.columns
    )
    for row in rows:
        try:
            views.prompt(row.content, row.number)
        except UsageError as error:
            raise UsageError(f"{row.source}: {error}") from None
    model = load_answering_model(name, kwargs, dtype_of(options.dtype))
    model.to("cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu")
    return judge(
        model,
        views,
        [row.content for row in rows],
        options.metrics,
        options.database,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        show_progress=sys.stderr.isatty(),
    )


def _checked(options: argparse.Namespace) -> Path:
    """The directory to write to, which must be possible."""
    if len(set(options.metrics)) < len(options.metrics):
        raise UsageError(f"metrics names one twice: {' '.join(options.metrics)}")
    if len(set(options.models)) < len(options.models):
        raise UsageError(f"MODEL names one twice: {' '.join(options.models)}")
    for metric in options.metrics:
        scorer(metric, options.database)
    dtype_of(options.dtype)
    for name in ("max_new_tokens", "max_samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    return output_folder(options.output_dir)


def _table(results: dict[str, Any], metrics: Sequence[str], rows: int) -> str:
    """A row for each model; shares in per cent, with their intervals."""
    lines = [
        (
            escaped(name),
            *(
                f"{100 * one['share']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
                for one in found.values()
            ),
        )
        for name, found in results.items()
    ]
    return f"% right of {rows:,} rows, with 95 % intervals\n\n{table(('model', *metrics), lines)}"
