"""`jepa-hf evaluate`: frozen encoders side by side, on labels, similarity and retrieval."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluation.embedder import POOLINGS, Embedder
from ..utils.atomic_files import whole_file
from ..version import __version__
from .console import complain, quiet_libraries
from .parsing import CommandParser, output_folder

_LIBRARIES = ("torch", "transformers", "scikit-learn", "sentence-transformers")


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code."""
    quiet_libraries()
    try:
        options = _parser().parse_args(argv)
        _run(options)
    except UsageError as error:
        return complain("jepa-hf evaluate", error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf evaluate",
        description="Judge frozen encoders side by side: linear probe and kNN on labelled samples, Spearman's "
        "correlation on scored pairs of texts, recall on texts that belong together, all with 95 % intervals.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="directories or Hub names of encoders; the first is compared with"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="files (csv, tsv, json, jsonl, parquet, npz), folders with train.* and test.*, or data sets on the Hub; "
        "their columns tell what they are: text, image or features with label; sentence1, sentence2 and score; pairs "
        "such as query and document",
    )
    parser.add_argument("--pooling", nargs="+", default=["mean"], help=f"out of {', '.join(POOLINGS)}; default mean")
    parser.add_argument("--output_dir", default="evaluation", help="where to write; default evaluation")
    parser.add_argument("--text_column_name", help="the column of texts, or first,second of pairs")
    parser.add_argument("--label_column_name", help="the column of labels")
    parser.add_argument("--feature_column_names", help="columns of features, with commas")
    parser.add_argument("--max_train_samples", type=int, help="draw so many rows to fit probes on")
    parser.add_argument("--max_test_samples", type=int, help="draw so many rows to test on")
    parser.add_argument("--batch_size", type=int, default=64, help="samples at once; default 64")
    parser.add_argument("--max_seq_length", type=int, help="cut texts to so many tokens; default what a model takes")
    parser.add_argument("--seed", type=int, default=42, help="of draws, splits and intervals; default 42")
    parser.add_argument(
        "--update_card",
        nargs="*",
        metavar="MODEL",
        help="put the results into the README.md of these models, directories here; of one model alone without a name",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that a model brings")
    return parser


def _run(options: argparse.Namespace) -> None:
    """Check everything, evaluate, write."""
    output_dir = _checked(options)
    try:
        from ..evaluation.results import card_of, read_card, to_markdown, update_card
        from ..evaluation.scoring import evaluate
        from ..evaluation.tasks import TaskArguments, load_tasks
    except ModuleNotFoundError as error:
        raise UsageError(
            f"evaluate needs {error.name}, which is not installed: pip install 'jepa_hf[evaluate]'"
        ) from None

    cards = {model: read_card(card_of(model)) for model in _models_with_cards(options)}
    names = ("text_column_name", "label_column_name", "feature_column_names", "max_train_samples", "max_test_samples")
    args = TaskArguments(seed=options.seed, **{name: getattr(options, name) for name in names})
    tasks = load_tasks(options.tasks, args)
    embedders = [
        Embedder.from_pretrained(
            model,
            batch_size=options.batch_size,
            max_seq_length=options.max_seq_length,
            trust_remote_code=options.trust_remote_code,
        )
        for model in options.models
    ]
    found = evaluate(embedders, tasks, options.pooling, seed=options.seed, show_progress=sys.stderr.isatty())

    written = _write(output_dir, found, options)
    for model, card in cards.items():
        update_card(card, found, model)
        _write_text(card_of(model), str(card))
    print(to_markdown(found))
    print(f"written to {output_dir}: {', '.join(written)}")
    for model in cards:
        print(f"updated {card_of(model)}")


def _write(output_dir: Path, found: Any, options: argparse.Namespace) -> list[str]:
    """Numbers, tables and pictures; returns the names of the files."""
    from ..evaluation.plots import plot_maps, plot_scores, plot_spectrum
    from ..evaluation.results import to_json, to_markdown

    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = {"scores.png": plot_scores, "spectrum.png": plot_spectrum}
    if found.samples:
        pictures["map.png"] = plot_maps
    else:
        (output_dir / "map.png").unlink(missing_ok=True)  # of an earlier evaluation
    for name, plot in pictures.items():
        with whole_file(output_dir / name) as new:
            plot(found, new)
    shown = "".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in pictures)
    _write_text(output_dir / "evaluation.md", f"# Evaluation\n\n{to_markdown(found)}{shown}")
    _write_text(output_dir / "evaluation.json", json.dumps(to_json(found, _settings(options)), indent=1) + "\n")
    return ["evaluation.json", "evaluation.md", *pictures]


def _checked(options: argparse.Namespace) -> Path:
    """The directory to write to, which must be possible."""
    for name in options.pooling:
        if name not in POOLINGS:
            raise UsageError(f"pooling must be one of {', '.join(POOLINGS)}, not {name!r}")
    if len(set(options.pooling)) < len(options.pooling):
        raise UsageError(f"pooling names one twice: {' '.join(options.pooling)}")
    if options.seed < 0:
        raise UsageError(f"seed must be at least 0, not {options.seed}")
    return output_folder(options.output_dir)


def _models_with_cards(options: argparse.Namespace) -> list[str]:
    """The models whose cards are to be updated."""
    if options.update_card is None:
        return []
    if not options.update_card and len(options.models) > 1:
        raise UsageError("update_card: name the models whose cards are to be updated")
    for model in options.update_card:
        if model not in options.models:
            raise UsageError(f"update_card: {model!r} is not among the models: {', '.join(options.models)}")
    return options.update_card or options.models


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, when, and with which versions."""
    versions = {"jepa_hf": __version__, **{name: version(name) for name in _LIBRARIES}}
    return {**vars(options), "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8", newline="")
