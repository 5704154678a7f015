"""`jepa-hf generate`: answers of language models to the rows of a file, and their scores."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import gather_object

from ..errors import UsageError
from ..llm_jepa import PairedViewTokenizer
from ..llm_jepa.answer_scoring import get_scorer, wilson_interval
from ..llm_jepa.generation import evaluate_generation
from ..llm_jepa.paired_data import PairedRow, load_file_rows
from ..training.run_directory import versions
from ..utils.atomic_files import atomic_write_dir
from ..utils.counts import counted
from ..utils.markdown import escape_markdown, markdown_table
from .console import CommandParser, run_command
from .language_model_loading import (
    check_generation_model,
    load_generation_model,
    load_lm_tokenizer,
    parse_dtype,
    refuse_unfinished_run,
)
from .parsing import validate_results_dir

PREDICTIONS, RESULTS = "predictions.jsonl", "generation.json"


def main(argv: Sequence[str]) -> int:
    """Generate answers and score them; returns the exit code."""
    return run_command("jepa-hf generate", _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf generate",
        description="Generate answers of language models to the prompts in a file, greedily and in batches, and score "
        "them. A row has messages, the last of which is the reference answer, or two columns.",
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
        help="any of exact_match (equal text), prefix_match (starts with the reference), gsm8k (equal final number), "
        "sql (equal result rows); default exact_match prefix_match",
    )
    parser.add_argument(
        "--database", help="for sql: an SQLite file, or a folder of NAME/NAME.sqlite, chosen by the rows' db_id"
    )
    parser.add_argument("--output_dir", default="generation", help="directory to write to; default generation")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the results of an earlier run")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="maximum tokens of an answer; default 128")
    parser.add_argument("--max_samples", type=int, help="use only the first N rows (default: all)")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts per batch; default 16")
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
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the models on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    return parser


def _run(options: argparse.Namespace) -> None:
    """Check all options, generate with each model, write the results on rank 0."""
    folder = _validate_options(options)
    process = PartialState(cpu=options.use_cpu)
    rows = load_file_rows("data_file", options.data_file)[: options.max_samples]
    view_tokenizers = [_view_tokenizer(name, rows, options) for name in options.models]
    results: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    for name, views in zip(options.models, view_tokenizers, strict=True):
        answers = _evaluate_model(name, rows, views, process, options)
        shares = {metric: sum(answer[metric] for answer in answers) / len(answers) for metric in options.metrics}
        results[name] = {metric: wilson_interval(share, len(rows)) for metric, share in shares.items()}
        predictions += [{"model": name, **answer} for answer in answers]
    if not process.is_main_process:
        return
    settings = {**vars(options), "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    content = {"rows": len(rows), "results": results, "settings": settings}
    with atomic_write_dir(folder) as new:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in predictions)
        (new / PREDICTIONS).write_text(lines, encoding="utf-8")
        (new / RESULTS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(_results_table(results, options.metrics, len(rows)))
    print(f"\nwritten to {folder}: {PREDICTIONS}, {RESULTS}")


def _hub_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    return {"revision": options.revision, "trust_remote_code": options.trust_remote_code}


def _view_tokenizer(name: str, rows: Sequence[PairedRow], options: argparse.Namespace) -> PairedViewTokenizer:
    """Load a model's tokenizer, and check prompts and model before any model generates."""
    kwargs = _hub_kwargs(options)
    argument, tokenizer_name = ("tokenizer_name", options.tokenizer_name) if options.tokenizer_name else ("MODEL", name)
    tokenizer = load_lm_tokenizer(argument, tokenizer_name, kwargs, options.chat_template_path)
    views = PairedViewTokenizer(
        tokenizer,
        text_turn=options.code_turn,
        code_turn=options.code_turn,
        text_column=options.text_column_name,
        code_column=options.code_column_name,
        num_predictor_tokens=0,
    )
    for row in rows:
        try:
            views.prompt(row.content, row.number)
        except UsageError as error:
            raise UsageError(f"{row.source}: {error}") from None
    check_generation_model(name, kwargs)
    return views


def _evaluate_model(
    name: str,
    rows: Sequence[PairedRow],
    views: PairedViewTokenizer,
    process: PartialState,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return each row's answer. Each rank generates a part of them."""
    model = load_generation_model(name, _hub_kwargs(options), parse_dtype(options.dtype))
    model = cast(Any, model).to(process.device)  # transformers wraps `to`, which hides its type
    _, answers = evaluate_generation(
        model,
        views,
        [row.content for row in rows[process.process_index :: process.num_processes]],
        options.metrics,
        options.database,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=name if process.is_main_process else None,
    )
    of_ranks = gather_object([answers])
    return [of_ranks[index % process.num_processes][index // process.num_processes] for index in range(len(rows))]


def _validate_options(options: argparse.Namespace) -> Path:
    """Check the options that need no model; returns the output directory."""
    if len(set(options.metrics)) < len(options.metrics):
        raise UsageError(f"metrics contains a name twice: {' '.join(options.metrics)}")
    if len(set(options.models)) < len(options.models):
        raise UsageError(f"MODEL contains a name twice: {' '.join(options.models)}")
    for metric in options.metrics:
        get_scorer(metric, options.database)
    parse_dtype(options.dtype)
    for name in ("max_new_tokens", "max_samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    for name in options.models:
        refuse_unfinished_run("MODEL", name)
    return validate_results_dir(options.output_dir, RESULTS, options.overwrite_output_dir, "run")


def _results_table(results: dict[str, Any], metrics: Sequence[str], rows: int) -> str:
    """Format a table with a row for each model, shares in per cent with their intervals."""
    lines = [
        (
            escape_markdown(name),
            *(
                f"{100 * share['share']:.1f} ({100 * share['low']:.1f} to {100 * share['high']:.1f})"
                for share in shares.values()
            ),
        )
        for name, shares in results.items()
    ]
    return f"% correct of {counted(rows, 'row')}, with 95 % intervals\n\n{markdown_table(('model', *metrics), lines)}"
