"""`jepa-hf evaluate`: comparison of frozen encoders on labels, similarity and retrieval."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluation.embedder import Embedder
from ..evaluation.plots import plot_embeddings, plot_scores, plot_spectrum
from ..evaluation.results import card_path, read_card, to_json, to_markdown, update_card
from ..evaluation.scoring import Evaluation, evaluate
from ..evaluation.task import TaskArguments
from ..evaluation.tasks import load_tasks
from ..utils.atomic_files import atomic_write, atomic_write_text
from ..utils.output_directory import check_results_dir
from ..version import __version__

RESULTS_FILE = "evaluation.json"
_LIBRARIES = ("torch", "transformers", "scikit-learn", "sentence-transformers")


def run(options: argparse.Namespace) -> None:
    """Check all options, evaluate, write the results."""
    if len(set(options.pooling)) < len(options.pooling):
        raise UsageError(f"pooling contains a name twice: {' '.join(options.pooling)}")
    output_dir = check_results_dir(options.output_dir, RESULTS_FILE, options.overwrite_output_dir)
    cards = {model: read_card(card_path(model)) for model in _models_with_cards(options)}
    names = ("text_column_name", "label_column_name", "feature_column_names", "max_train_samples", "max_test_samples")
    args = TaskArguments(seed=options.seed, **{name: getattr(options, name) for name in names})
    embedders = [
        Embedder.from_pretrained(
            model,
            batch_size=options.batch_size,
            max_seq_length=options.max_seq_length,
            trust_remote_code=options.trust_remote_code,
        )
        for model in options.models
    ]
    tasks = load_tasks(options.tasks, args, _feature_column_names(embedders))
    evaluation = evaluate(embedders, tasks, options.pooling, seed=options.seed, show_progress=True)

    written = _write(output_dir, evaluation, options)
    for model, card in cards.items():
        update_card(card, evaluation, model)
        atomic_write_text(card_path(model), str(card))
    print(to_markdown(evaluation))
    print(f"written to {output_dir}: {', '.join(written)}")
    for model in cards:
        print(f"updated {card_path(model)}")


def _feature_column_names(embedders: Sequence[Embedder]) -> list[str] | None:
    """Return all columns that the encoders read; None if one of them has no names."""
    names = [embedder.feature_column_names for embedder in embedders]
    if any(columns is None for columns in names):
        return None
    return list(dict.fromkeys(column for columns in names for column in columns or ()))


def _write(output_dir: Path, evaluation: Evaluation, options: argparse.Namespace) -> list[str]:
    """Write numbers, tables and pictures; returns the names of the files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = {"scores.png": plot_scores, "spectrum.png": plot_spectrum}
    if evaluation.samples:
        pictures["map.png"] = plot_embeddings
    else:
        (output_dir / "map.png").unlink(missing_ok=True)  # of an earlier evaluation
    for name, plot in pictures.items():
        with atomic_write(output_dir / name) as new:
            plot(evaluation, new)
    images = "".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in pictures)
    atomic_write_text(output_dir / "evaluation.md", f"# Evaluation\n\n{to_markdown(evaluation)}{images}")
    atomic_write_text(output_dir / RESULTS_FILE, json.dumps(to_json(evaluation, _settings(options)), indent=1) + "\n")
    return [RESULTS_FILE, "evaluation.md", *pictures]


def _models_with_cards(options: argparse.Namespace) -> list[str]:
    """Return the models whose cards are to be updated."""
    if options.update_card is None:
        return []
    if not options.update_card and len(options.models) > 1:
        raise UsageError("update_card: name the models whose cards are to be updated")
    for model in options.update_card:
        if model not in options.models:
            raise UsageError(f"update_card: {model!r} is not among the models: {', '.join(options.models)}")
    return options.update_card or options.models


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return options, date and versions, for evaluation.json."""
    versions = {"jepa_hf": __version__, **{name: version(name) for name in _LIBRARIES}}
    return {**vars(options), "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
