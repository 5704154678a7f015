"""An evaluation in words and numbers: JSON, a Markdown table, and the section of a model card."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard

from ..errors import UsageError
from ..hub.model_card import BEGIN, END, dataset_type
from ..utils.markdown import escaped, one_line, table
from .plots import METRIC_LABELS
from .scoring import Evaluation, Health, Interval, Score

# By which a later evaluation knows what an earlier one put into a card's metadata.
_SIGNATURE = "(jepa-hf evaluate)"
_METRIC_TYPES = {"linear_probe": "accuracy", "knn": "accuracy", "spearman": "spearmanr"}
_TASK_TYPES = {"text": "text-classification", "images": "image-classification", "features": "tabular-classification"}


def to_json(evaluation: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that was found, as JSON knows it; scores as fractions.

    Args:
        settings: of the call, and versions of libraries: written as they are.
    """
    tasks = [
        {
            "name": task.name,
            "source": task.source,
            "kind": task.kind,
            "modality": task.modality,
            **{f"n_{name}": len(split) for name in ("train", "validation", "test") if (split := getattr(task, name))},
            **({"classes": len(np.unique(task.train.targets))} if task.kind == "labels" else {}),
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
    if score.penalty is not None:
        content["C"] = score.penalty
    return content


def _interval_json(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "confidence_interval": [interval.low, interval.high]}


def _health_json(health: Health) -> dict[str, Any]:
    names = ("model", "pooling", "task", "n", "effective_rank", "mean_pairwise_cosine")
    content = {name: getattr(health, name) for name in names}
    return content | {"singular_values": [float(f"{value:.4g}") for value in health.singular_values]}


def to_markdown(evaluation: Evaluation) -> str:
    """Tables: scores, differences to the first model where there are several, and the health of representations."""
    parts = [
        _score_table(evaluation),
        "Scores x 100 on test samples, with 95 % intervals (percentile bootstrap over these samples). Bold: the best "
        "of a column, where no other value lies in its interval. *Linear probe* and *kNN* are shares of right answers: "
        "logistic regression on standardised vectors, with C chosen on a part of the training samples, and the 20 "
        "nearest training samples by cosine.",
    ]
    if any(score.difference for score in evaluation.scores):
        first = evaluation.short_names[evaluation.models[0]]
        parts += [
            f"Difference to {escaped(first)} on the same samples, with paired 95 % intervals:",
            _differences(evaluation),
        ]
    parts += ["The representations of the test samples:", _health_table(evaluation)]
    return "\n\n".join(parts) + "\n"


def _score_table(evaluation: Evaluation) -> str:
    best = _clearly_best(evaluation)
    cells = {}
    for score in evaluation.scores:
        value = f"{100 * score.score.value:.1f}"
        value = f"**{value}**" if score in best else value
        shown = f"{value} [{100 * score.score.low:.1f}, {100 * score.score.high:.1f}]"
        cells[score.model, score.pooling, score.task, score.metric] = shown
    return _table(evaluation, cells)


def _differences(evaluation: Evaluation) -> str:
    cells = {
        (score.model, score.pooling, score.task, score.metric): (
            f"{100 * score.difference.value:+.1f} "
            f"[{100 * score.difference.low:+.1f}, {100 * score.difference.high:+.1f}]"
        )
        for score in evaluation.scores
        if score.difference is not None
    }
    return _table(evaluation, cells)


def _table(evaluation: Evaluation, cells: dict[tuple[str, str, str, str], str]) -> str:
    """A row for each model and pooling that has cells, a column for each task and metric."""
    columns = list(dict.fromkeys((score.task, score.metric, score.n) for score in evaluation.scores))
    header = [
        "model",
        "pooling",
        *(f"{escaped(task)}, {METRIC_LABELS.get(metric, metric)} (n = {n:,})" for task, metric, n in columns),
    ]
    lines = [
        [
            escaped(evaluation.short_names[model]),
            name,
            *(cells[model, name, task, metric] for task, metric, _ in columns),
        ]
        for model in evaluation.models
        for name in evaluation.pooling
        if (model, name, *columns[0][:2]) in cells
    ]
    return table(header, lines)


def _health_table(evaluation: Evaluation) -> str:
    lines = [
        [
            escaped(evaluation.short_names[health.model]),
            health.pooling,
            escaped(health.task),
            f"{health.n:,}",
            f"{health.effective_rank:.1f}",
            f"{health.mean_pairwise_cosine:.3f}",
        ]
        for health in evaluation.health
    ]
    return table(["model", "pooling", "task", "vectors", "effective rank", "mean pairwise cosine"], lines)


def _clearly_best(evaluation: Evaluation) -> list[Score]:
    """Of each column the best score, where its interval holds no other's value."""
    found = []
    for column in dict.fromkeys((score.task, score.metric) for score in evaluation.scores):
        scores = [score for score in evaluation.scores if (score.task, score.metric) == column]
        best = max(scores, key=lambda score: score.score.value)
        if len(scores) > 1 and all(score.score.value < best.score.low for score in scores if score is not best):
            found.append(best)
    return found


# ---- the card


def card_of(model: str) -> Path:
    """Where the card lies in a model's directory."""
    return Path(model) / "README.md"


def read_card(path: Path) -> ModelCard:
    """A card that `update_card` can write to; its line ends stay as they are.

    Raises:
        UsageError: no card, damaged metadata, or marks of an earlier section that are not one pair.
    """
    if not path.is_file():
        raise UsageError(f"card '{path}' does not exist; only models in directories that have a card can get results")
    try:
        content = path.read_bytes().decode("utf-8")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of cards without metadata
        card = ModelCard(content)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"card '{path}' has damaged metadata: {' '.join(str(error).split())[:200]}") from None
    counts = (content.count(BEGIN), content.count(END))
    if counts not in ((0, 0), (1, 1)) or content.find(BEGIN) > content.find(END):
        raise UsageError(f"card '{path}' has its marks {BEGIN} and {END} in disorder; mend or delete them")
    return card


def update_card(card: ModelCard, evaluation: Evaluation, model: str) -> None:
    """Put the tables of an evaluation into a card, in the place of those of an earlier one or at its end.

    The model's scores become the card's `model-index`, beside those that this function did not put there. All other
    text stays as it is; the metadata keeps its values and is written anew.

    Args:
        card: as `read_card` gives it; changed in place.
        model: whose card it is, out of `evaluation.models`.
    """
    section = f"{BEGIN}\n## Evaluation of the frozen representations\n\n{to_markdown(evaluation)}{END}"
    before, mark, rest = card.text.partition(BEGIN)
    card.text = before + section + rest.partition(END)[2] if mark else f"{before.rstrip()}\n\n{section}\n"
    kept = [result for result in card.data.eval_results or [] if _SIGNATURE not in (result.metric_name or "")]
    card.data.eval_results = kept + _results(evaluation, model)
    card.data.model_name = card.data.model_name or one_line(evaluation.short_names[model]) or "model"


def _results(evaluation: Evaluation, model: str) -> list[EvalResult]:
    tasks = {task.name: task for task in evaluation.tasks}
    types = {"similarity": "sentence-similarity", "retrieval": "text-retrieval"}
    return [
        EvalResult(
            task_type=types.get(tasks[score.task].kind, _TASK_TYPES[tasks[score.task].modality]),
            dataset_type=dataset_type(score.task),
            dataset_name=one_line(score.task) or "local",
            dataset_split="test",
            metric_type=_METRIC_TYPES.get(score.metric, score.metric.replace("@", "_at_")),
            metric_name=f"{METRIC_LABELS.get(score.metric, score.metric)}, {score.pooling} pooling {_SIGNATURE}",
            metric_value=round(score.score.value, 4),
        )
        for score in evaluation.scores
        if score.model == model
    ]
