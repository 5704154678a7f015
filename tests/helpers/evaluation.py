"""Evaluations with made-up scores, to be drawn and written."""

from collections.abc import Sequence

import numpy as np

from jepa_hf.evaluation.scoring import METRICS, Evaluation, Interval, LabelledEmbeddings, RepresentationStats, Score
from jepa_hf.evaluation.task import Split, Task

KINDS = {"topics": "labels", "pairs": "similarity", "answers": "retrieval"}


def fake_evaluation(
    models: Sequence[str] = ("runs/a", "runs/b"),
    pooling: Sequence[str] = ("mean",),
    tasks: Sequence[str] = tuple(KINDS),
    classes: int = 3,
    count: int = 60,
    gap: float = 0.2,
) -> Evaluation:
    """Each model is better than the one before by `gap`; intervals reach 0.05 to either side."""
    rng = np.random.default_rng(0)
    labels = np.array([f"class {row % classes}" for row in range(count)])
    texts = [f"text {row}" for row in range(count)]
    found = Evaluation(list(models), [], list(pooling))
    for name in tasks:
        kind = KINDS[name]
        sides = (texts,) if kind == "labels" else (texts, texts)
        test = Split(sides, {"labels": labels, "similarity": np.arange(count) / 1.0}.get(kind))
        found.tasks.append(Task(name, f"{name}.csv", kind, "text", test, test if kind == "labels" else None))
        for number, model in enumerate(models):
            for which in pooling:
                place = (model, which, name)
                for metric in METRICS[kind]:
                    value = 0.3 + gap * number
                    difference = Interval(gap * number, gap * number - 0.02, gap * number + 0.02) if number else None
                    penalty = 0.1 if metric == "linear_probe" else None
                    interval = Interval(value, value - 0.05, value + 0.05)
                    found.scores.append(Score(*place, metric, interval, count, difference, penalty))
                singular = 0.9 ** np.arange(8.0) if number else np.array([1.0, 0.5, 0.0])
                found.health.append(RepresentationStats(*place, count, 4.0, 0.25, singular))
                if kind == "labels":
                    centres = np.eye(8)[np.arange(count) % classes % 8] * 4 * number
                    found.samples.append(LabelledEmbeddings(*place, rng.normal(size=(count, 8)) + centres, labels))
    return found
