"""Results of an evaluation as JSON, as Markdown tables, and as a section of a model card."""

import logging
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UsageError, one_line
from ..hub.model_card import EVALUATION_END, EVALUATION_START, dataset_type
from ..utils.markdown import escape_markdown, markdown_table, single_line
from .names import METRIC_LABELS
from .scoring import Evaluation, Interval, RepresentationStats, Score
from .task import require_targets

# Marks the results in a card's metadata that a later evaluation replaces.
_RESULT_MARKER = "(jepa-hf evaluate)"
_METRIC_TYPES = {"linear_probe": "accuracy", "knn": "accuracy", "spearman": "spearmanr"}
_TASK_TYPES = {"text": "text-classification", "images": "image-classification", "features": "tabular-classification"}


def to_json(evaluation: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """Convert an evaluation to JSON types; scores are fractions, and `settings` are copied unchanged."""
    tasks = [
        {
            "name": task.name,
            "source": task.source,
            "kind": task.kind,
            "modality": task.modality,
            **{f"n_{name}": len(split) for name in ("train", "validation", "test") if (split := getattr(task, name))},
            **({"classes": len(np.unique(require_targets(task.train)))} if task.kind == "labels" else {}),
        }
        for task in evaluation.tasks
    ]
    return {
        "settings": settings,
        "models": evaluation.models,
        "tasks": tasks,
        "scores": [_score_json(score) for score in evaluation.scores],
        "health": [_health_json(health) for health in evaluation.health],
    }


def _score_json(score: Score) -> dict[str, Any]:
    content = {name: getattr(score, name) for name in ("model", "pooling", "task", "metric", "n")}
    content |= _interval_json(score.score)
    if score.difference is not None:
        content["difference_to_first_model"] = _interval_json(score.difference)
    if score.inverse_regularization is not None:
        content["C"] = score.inverse_regularization
    return content


def _interval_json(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "confidence_interval": [interval.low, interval.high]}


def _health_json(health: RepresentationStats) -> dict[str, Any]:
    names = ("model", "pooling", "task", "n", "effective_rank", "mean_pairwise_cosine")
    content = {name: getattr(health, name) for name in names}
    return content | {"singular_values": [float(f"{value:.4g}") for value in health.singular_values]}


def to_markdown(evaluation: Evaluation) -> str:
    """Format Markdown tables of scores, differences to the first model, and collapse metrics."""
    best = _significantly_best(evaluation)
    differences = {
        score: _cell(score.difference, not score.difference.low <= 0 <= score.difference.high, "+")
        for score in evaluation.scores
        if score.difference is not None
    }
    parts = [
        _table(evaluation, {score: _cell(score.score, score in best) for score in evaluation.scores}),
        "Scores x 100 on test samples, with 95 % intervals (percentile bootstrap over these samples). Bold: the best "
        "value of a column, if its interval contains no other value. *Linear probe* and *kNN* are accuracies. The "
        "linear probe is a logistic regression on standardized vectors; its C is chosen on part of the training "
        "samples. kNN is a vote of the 20 nearest training samples by cosine.",
    ]
    if differences:
        first = evaluation.short_names[evaluation.models[0]]
        parts += [
            f"Difference to {escape_markdown(first)} on the same samples, with paired 95 % intervals. Bold: the "
            "interval excludes 0.",
            _table(evaluation, differences),
        ]
    parts += ["Representations of the test samples:", _health_table(evaluation)]
    return "\n\n".join(parts) + "\n"


def _cell(interval: Interval, is_bold: bool, sign: str = "") -> str:
    """Format a value x 100 with its interval; the sign "+" shows that of positive numbers."""
    # Adding 0 turns -0.0 into 0.0.
    value, low, high = (
        f"{round(100 * number, 1) + 0.0:{sign}.1f}" for number in (interval.value, interval.low, interval.high)
    )
    return f"{f'**{value}**' if is_bold else value} [{low}, {high}]"


def _table(evaluation: Evaluation, cells: dict[Score, str]) -> str:
    """Format a row for each model and pooling with cells, a column for each task and metric."""
    columns = list(dict.fromkeys((score.task, score.metric, score.n) for score in evaluation.scores))
    header = [
        "model",
        "pooling",
        *(f"{escape_markdown(task)}, {METRIC_LABELS.get(metric, metric)} (n = {n:,})" for task, metric, n in columns),
    ]
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for score, cell in cells.items():
        rows.setdefault((score.model, score.pooling), {})[score.task, score.metric] = cell
    lines = [
        [
            escape_markdown(evaluation.short_names[model]),
            pooling,
            *(rows[model, pooling][task, metric] for task, metric, _ in columns),
        ]
        for model, pooling in product(evaluation.models, evaluation.pooling)
        if (model, pooling) in rows
    ]
    return markdown_table(header, lines)


def _health_table(evaluation: Evaluation) -> str:
    lines = [
        [
            escape_markdown(evaluation.short_names[health.model]),
            health.pooling,
            escape_markdown(health.task),
            f"{health.n:,}",
            f"{health.effective_rank:.1f}",
            f"{health.mean_pairwise_cosine:.3f}",
        ]
        for health in evaluation.health
    ]
    return markdown_table(["model", "pooling", "task", "vectors", "effective rank", "mean pairwise cosine"], lines)


def _significantly_best(evaluation: Evaluation) -> list[Score]:
    """Return each column's best score whose interval contains no other value of the column."""
    clearly_best = []
    for column in dict.fromkeys((score.task, score.metric) for score in evaluation.scores):
        scores = [score for score in evaluation.scores if (score.task, score.metric) == column]
        best = max(scores, key=lambda score: score.score.value)
        if len(scores) > 1 and all(score.score.value < best.score.low for score in scores if score is not best):
            clearly_best.append(best)
    return clearly_best


# ---- the card


def card_path(model: str) -> Path:
    """Return the path of the card in a model's directory."""
    return Path(model) / "README.md"


def read_card(path: Path) -> ModelCard:
    """Read a card for `update_card`; its line endings are kept.

    Raises:
        UsageError: the card is missing, its metadata is damaged, or the markers of an earlier section are not one pair.
    """
    if not path.is_file():
        raise UsageError(f"Card '{path}' does not exist. Leave this model out of --update_card, or write a card.")
    try:
        content = path.read_bytes().decode("utf-8")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of cards without metadata
        card = ModelCard(content)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"Card '{path}' has damaged metadata: {one_line(error)[:200]}") from None
    counts = (content.count(EVALUATION_START), content.count(EVALUATION_END))
    if counts not in ((0, 0), (1, 1)) or content.find(EVALUATION_START) > content.find(EVALUATION_END):
        raise UsageError(
            f"Expected one {EVALUATION_START} followed by one {EVALUATION_END} in card '{path}'. Fix or delete them."
        )
    return card


def update_card(card: ModelCard, evaluation: Evaluation, model: str) -> None:
    """Write the tables to a card of `read_card`, in place of those of an earlier evaluation or at the end.

    The scores of `model`, one of `evaluation.models`, are added to the card's `model-index`; results of other origin
    are kept, and so are all other text and metadata.
    """
    section = (
        f"{EVALUATION_START}\n## Evaluation of the frozen representations\n\n{to_markdown(evaluation)}{EVALUATION_END}"
    )
    before, marker, rest = card.text.partition(EVALUATION_START)
    card.text = before + section + rest.partition(EVALUATION_END)[2] if marker else f"{before.rstrip()}\n\n{section}\n"
    data = cast(ModelCardData, card.data)
    others = [result for result in data.eval_results or [] if _RESULT_MARKER not in (result.metric_name or "")]
    data.eval_results = others + _results(evaluation, model)
    data.model_name = data.model_name or single_line(evaluation.short_names[model]) or "model"


def _results(evaluation: Evaluation, model: str) -> list[EvalResult]:
    """Convert a model's scores to entries of `model-index`."""
    tasks = {task.name: task for task in evaluation.tasks}
    types = {"similarity": "sentence-similarity", "retrieval": "text-retrieval"}
    return [
        EvalResult(
            task_type=types.get(tasks[score.task].kind, _TASK_TYPES[tasks[score.task].modality]),
            dataset_type=dataset_type(score.task),
            dataset_name=single_line(score.task) or "local",
            dataset_split="test",
            metric_type=_METRIC_TYPES.get(score.metric, score.metric.replace("@", "_at_")),
            metric_name=f"{METRIC_LABELS.get(score.metric, score.metric)}, {score.pooling} pooling {_RESULT_MARKER}",
            metric_value=round(score.score.value, 4),
        )
        for score in evaluation.scores
        if score.model == model
    ]
