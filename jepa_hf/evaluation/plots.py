"""Pictures of an evaluation: scores with their intervals, singular values, and maps of the labelled samples."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .scoring import Evaluation, Sample, Score

METRIC_LABELS = {"linear_probe": "linear probe", "knn": "kNN", "spearman": "Spearman"}
_HATCHES = ("", "///", "...")
_LINES = ("-", "--", ":")
_GROUPS_IN_A_ROW = 6
_MOST_CLASSES = 20
# Below so many points t-SNE has no neighbourhoods to keep.
_FEWEST_FOR_TSNE = 50


def plot_scores(evaluation: Evaluation, path: str | Path) -> None:
    """Draw bars with 95 % intervals to a PNG: a group for each task and metric, a colour for each model.

    A pooling has its own hatching.
    """
    groups = list(dict.fromkeys((score.task, score.metric) for score in evaluation.scores))
    count = math.ceil(len(groups) / _GROUPS_IN_A_ROW)
    size = math.ceil(len(groups) / count)
    figure = _figure(2.5 + 1.6 * size, 3.6 * count + 0.5)
    for number, axis in enumerate(figure.subplots(count, 1, squeeze=False)[:, 0]):
        shown = groups[number * size : (number + 1) * size]
        for place, group in enumerate(shown):
            found = [score for score in evaluation.scores if (score.task, score.metric) == group]
            _draw_group(evaluation, axis, place, found)
        axis.set_xticks(
            range(len(shown)), [f"{task}\n{METRIC_LABELS.get(metric, metric)}" for task, metric in shown], fontsize=9
        )
        axis.set_xlim(-0.6, size - 0.4)
        axis.set_ylabel("score x 100")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    handles = [
        Patch(facecolor=_colour(evaluation, name), label=evaluation.short_names[name]) for name in evaluation.models
    ]
    if len(evaluation.pooling) > 1:
        handles += [
            Patch(facecolor="white", edgecolor="black", hatch=hatch, label=f"{name} pooling")
            for name, hatch in zip(evaluation.pooling, _HATCHES, strict=False)
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=9, frameon=False)
    figure.suptitle("Frozen representations, with 95 % intervals", fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_group(evaluation: Evaluation, axis: Axes, place: int, found: list[Score]) -> None:
    width = 0.8 / len(found)
    for number, score in enumerate(found):
        at, value = place - 0.4 + width * (number + 0.5), 100 * score.score.value
        errors = [[value - 100 * score.score.low], [100 * score.score.high - value]]
        axis.bar(
            at,
            value,
            0.92 * width,
            color=_colour(evaluation, score.model),
            hatch=_HATCHES[evaluation.pooling.index(score.pooling)],
            edgecolor="white",
            linewidth=0.5,
        )
        axis.errorbar(at, value, np.maximum(errors, 0), fmt="none", ecolor="black", elinewidth=1, capsize=2)
        if len(found) <= 4:
            top = 100 * score.score.high if value >= 0 else max(value, 0)
            axis.annotate(f"{value:.1f}", (at, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)


def plot_spectrum(evaluation: Evaluation, path: str | Path) -> None:
    """Draw the singular values of each model's representations over the largest to a PNG, one panel for each task.

    A curve that falls early is a representation that uses few directions.
    """
    tasks = [task.name for task in evaluation.tasks]
    figure, axes = _panels(len(tasks), 4.2, 3.4)
    for task, axis in zip(tasks, axes, strict=True):
        for found in (health for health in evaluation.health if health.task == task):
            values = found.singular_values[found.singular_values > 1e-6]
            label = evaluation.short_names[found.model]
            label += f", {found.pooling}" if len(evaluation.pooling) > 1 else ""
            axis.plot(
                range(1, len(values) + 1),
                values,
                _LINES[evaluation.pooling.index(found.pooling)],
                color=_colour(evaluation, found.model),
                label=f"{label} (rank {found.effective_rank:.0f})",
            )
        axis.set_yscale("log")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("singular value")
        axis.set_ylabel("over the largest")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle("Singular values of the centred representations, with their effective rank", fontsize=11)
    figure.savefig(path, dpi=110)


def plot_maps(evaluation: Evaluation, path: str | Path, seed: int = 42) -> None:
    """Draw the test samples of labelled tasks on a plane to a PNG: a row for each task, a column for each model.

    At most 2,000 of them, with the first pooling: the first 50 principal components, then t-SNE (van der Maaten and
    Hinton 2008); of fewer than 50 samples the first two components. Of more than 20 classes the 20 largest have
    colours.

    Raises:
        ValueError: no task has labels.
    """
    shown = [sample for sample in evaluation.samples if sample.pooling == evaluation.pooling[0]]
    tasks = list(dict.fromkeys(sample.task for sample in shown))
    if not tasks:
        raise ValueError("no task has labels, so there is nothing to map")
    figure = _figure(3.6 * len(evaluation.models) + 1.6, 3.5 * len(tasks) + 0.4)
    axes = figure.subplots(len(tasks), len(evaluation.models), squeeze=False)
    for row, task in enumerate(tasks):
        for axis, sample in zip(axes[row], (sample for sample in shown if sample.task == task), strict=True):
            handles = _draw_map(axis, sample, seed)
            axis.set_title(f"{task}: {evaluation.short_names[sample.model]}", fontsize=9)
        axes[row][-1].legend(
            *handles,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            fontsize=7,
            frameon=False,
            handletextpad=0.3,
            ncols=1 + (len(handles[0]) > 11),
        )
    figure.suptitle("Test samples by label (PCA, then t-SNE)", fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_map(axis: Axes, sample: Sample, seed: int) -> tuple[list[Line2D], list[str]]:
    """Points and, for a legend, handles and labels."""
    points = _plane(sample.vectors, seed)
    area = np.interp(len(points), (200, 2000), (16, 5))
    classes, counts = np.unique(sample.labels, return_counts=True)
    coloured = sorted(classes[np.argsort(-counts, kind="stable")[:_MOST_CLASSES]], key=_natural)
    colours = matplotlib.colormaps["tab10" if len(coloured) <= 10 else "tab20"]
    others = ~np.isin(sample.labels, coloured)
    groups = [(others, "lightgrey", f"{len(classes) - len(coloured)} other classes")] if others.any() else []
    groups += [(sample.labels == name, colours(number), _short(name)) for number, name in enumerate(coloured)]
    for chosen, colour, _ in groups:
        axis.scatter(*points[chosen].T, s=area, color=colour, alpha=0.7, linewidths=0)
    axis.set_xticks([])
    axis.set_yticks([])
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, markersize=4) for _, colour, _ in groups]
    return handles, [label for _, _, label in groups]


def _plane(vectors: np.ndarray, seed: int) -> np.ndarray:
    """`[N, D]` -> `[N, 2]`."""
    few = len(vectors) < _FEWEST_FOR_TSNE
    components = min(2 if few else 50, *vectors.shape)
    reduced = PCA(components, random_state=seed).fit_transform(vectors)
    if few or reduced.std() == 0:
        return np.pad(reduced[:, :2], ((0, 0), (0, max(2 - reduced.shape[1], 0))))
    perplexity = min(30, len(vectors) / 4)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def _natural(name: str) -> tuple[int, str]:
    """9 before 10."""
    return (int(name) if name.isdecimal() else -1, name)


def _short(name: str) -> str:
    # Matplotlib takes dollars for mathematics.
    name = str(name).replace("$", r"\$")
    return name if len(name) <= 24 else f"{name[:23]}…"


def _colour(evaluation: Evaluation, model: str) -> str:
    return f"C{evaluation.models.index(model) % 10}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = _figure(width * columns + 0.4, height * rows + 0.4)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.axis("off")
    return figure, axes[:count]
