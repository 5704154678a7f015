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
from ..training.run_directory import check_has_model, versions
from ..utils.atomic_files import atomic_write_dir
from ..utils.counts import counted
from ..utils.markdown import escape_markdown, markdown_table
from ..utils.output_directory import check_results_dir
from .language_model_loading import (
    check_generation_model,
    load_generation_model,
    load_lm_tokenizer,
    parse_dtype,
)

PREDICTIONS, RESULTS = "predictions.jsonl", "generation.json"


def run(options: argparse.Namespace) -> None:
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
    check_generation_model(name, kwargs)
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
    return views


def _evaluate_model(
    name: str, rows: Sequence[PairedRow], views: PairedViewTokenizer, process: PartialState, options: argparse.Namespace
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
    for name in options.models:
        check_has_model("MODEL", name)
    return check_results_dir(options.output_dir, RESULTS, options.overwrite_output_dir)


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
