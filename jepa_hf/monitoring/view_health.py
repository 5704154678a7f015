"""Findings about a run of LLM-JEPA: whether its views collapsed, and whether anything was learned."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..utils.formatting import format_number, format_share
from .health import FALLEN_RATIO, UNCHANGED, is_finished, loss_change

# Plain fine-tuning leaves 0.88 and the paper's loss 0.9996 to 0.9999 (benchmarks/RESULTS.md, section 21).
MAX_PAIRWISE_COSINE = 0.99
# Below this multiple of chance, the top-1 accuracy of the views counts as chance.
MIN_CHANCE_MULTIPLE = 2.0
# What helps against each kind of finding.
VIEW_REMEDIES = {
    "divergence": "lower --learning_rate, or raise --warmup_steps.",
    "nothing_learned": "train longer, or raise --learning_rate.",
    "view_collapse": "set --pair_loss infonce, or lower --jepa_weight.",
    "views_at_chance": "train longer, set --pair_loss infonce, or raise --jepa_weight.",
}
# Terms of the loss, that which best shows whether anything was learned first.
_TERMS = {"lm_loss": "next-token loss", "pair_loss": "distance between the views", "stp_loss": "STP loss"}


def term_weights(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each term of the loss by its name in the log; 0 for terms that are not trained.

    Args:
        settings: the fields of `LlmJepaTrainingArguments` by name.

    >>> term_weights({"lm_weight": 1.0, "jepa_weight": 2.0, "stp_weight": 0.0, "loss_dropout": 1.0})
    {'lm_loss': 1.0, 'pair_loss': 0.0, 'stp_loss': 0.0}
    """
    pair_weight = settings["jepa_weight"] if settings["loss_dropout"] < 1 else 0.0
    return {"lm_loss": settings["lm_weight"], "pair_loss": pair_weight, "stp_loss": settings["stp_weight"]}


def view_findings(
    history: Iterable[Mapping[str, Any]], weights: Mapping[str, float], max_steps: int | None = None
) -> tuple[dict[str, tuple[int, str]], str]:
    """Return step and sentence of each kind of finding in the log of a run, and a sentence about what was learned.

    Args:
        history: The log. Evaluations count, and the training's own batches without any.
        weights: See `term_weights`.
        max_steps: The run's length in steps, at which it is judged whether anything was learned;
            None for no such judgment.
    """
    entries = [entry for entry in history if "step" in entry]
    last_step = max((entry["step"] for entry in entries), default=0)
    found = _view_collapse(entries) if weights["pair_loss"] else {}
    loss, accuracy = _loss_change(entries, weights), _view_accuracy(entries) if weights["pair_loss"] else None
    learned, is_at_chance = [], False
    if accuracy is not None:
        is_at_chance = not accuracy[0] >= MIN_CHANCE_MULTIPLE * accuracy[1]
        own, chance = map(format_share, accuracy)
        learned = [f"The first view finds its own second view in {own} of the rows (chance {chance})."]
    if loss is not None:
        name, start, end = loss
        change = f"from {format_number(start)} to {format_number(end)}"
        how = "fell" if end < FALLEN_RATIO * start else "hardly changed," if end < start / FALLEN_RATIO else "rose"
        learned.insert(0, f"The {name} {how} {change}.")
        if not math.isfinite(end):
            found["divergence"] = last_step, f"divergence: the {name} is not finite any more"
        elif math.isclose(end, start, rel_tol=UNCHANGED) or (end >= start and (accuracy is None or is_at_chance)):
            found["nothing_learned"] = last_step, f"nothing learned: the {name} did not fall, but went {change}"
    if is_at_chance and not {"view_collapse", "nothing_learned"}.intersection(found):
        sentence = f"the first view finds its own second view in {own} of the rows, where chance gives {chance}"
        found["views_at_chance"] = last_step, f"nothing learned about the views: {sentence}"
    if not is_finished(entries, max_steps):
        found.pop("nothing_learned", None)
        found.pop("views_at_chance", None)
    return found, " ".join(learned)


def _loss_change(entries: list[Mapping[str, Any]], weights: Mapping[str, float]) -> tuple[str, float, float] | None:
    """Return description, start and end of the first trained term; None if they were not logged."""
    name = next(name for name in _TERMS if weights.get(name))
    change = loss_change(entries, name)
    if change is None:
        return None
    start, end, is_evaluated = change
    return _TERMS[name] + ("" if is_evaluated else " in training"), start, end


def _view_accuracy(entries: list[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the last top-1 accuracy of the views and its chance, of several data sets the one nearest to chance.

    None without an evaluation.
    """
    last = {
        name: (entry[name], entry[f"{name}_chance"])
        for entry in entries
        for name in entry
        if name.endswith("view_top1_accuracy") and entry["step"] > 0
    }
    return min(last.values(), key=lambda values: values[0] / values[1], default=None)


def _view_collapse(entries: list[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Return the finding that the second views have collapsed, with the step since which they are."""
    measured: dict[str, list[tuple[int, float]]] = {"evaluation": [], "training": []}
    for entry in entries:
        for name, value in entry.items():
            if name.endswith("view_pairwise_cosine") and entry["step"] > 0:
                measured["evaluation" if name.startswith("eval_") else "training"].append((entry["step"], value))
    cosines = measured["evaluation"] or measured["training"]
    apart = [index for index, (_, cosine) in enumerate(cosines) if cosine <= MAX_PAIRWISE_COSINE]
    collapsed = cosines[apart[-1] + 1 :] if apart else cosines
    if not collapsed:
        return {}
    sentence = (
        f"the views collapsed: the second views of different rows have a mean cosine of {collapsed[-1][1]:.4f}, so "
        "that a small distance between the views of a row says nothing"
    )
    return {"view_collapse": (collapsed[0][0], sentence)}
