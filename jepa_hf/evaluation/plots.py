"""Plots of an evaluation: scores with intervals, singular values, and maps of labelled samples."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .names import METRIC_LABELS
from .scoring import Evaluation, LabelledEmbeddings, Score

_HATCHES = ("", "///", "...")
_LINES = ("-", "--", ":")
_GROUPS_IN_A_ROW = 6
_MAX_CLASSES = 20
# With fewer points t-SNE has no neighbourhoods to preserve.
_MIN_FOR_TSNE = 50


def plot_scores(evaluation: Evaluation, path: str | Path) -> None:
    """Plot scores as bars with 95 % intervals to a PNG.

    Each task and metric has a group of bars, each model a color, and each pooling a hatch pattern.
    """
    groups = list(dict.fromkeys((score.task, score.metric) for score in evaluation.scores))
    count = math.ceil(len(groups) / _GROUPS_IN_A_ROW)
    size = math.ceil(len(groups) / count)
    figure = _figure(2.5 + 1.6 * size, 3.6 * count + 0.5)
    for number, axis in enumerate(figure.subplots(count, 1, squeeze=False)[:, 0]):
        row = groups[number * size : (number + 1) * size]
        for position, group in enumerate(row):
            scores = [score for score in evaluation.scores if (score.task, score.metric) == group]
            _draw_group(evaluation, axis, position, scores)
        labels = [f"{task}\n{METRIC_LABELS.get(metric, metric)}" for task, metric in row]
        axis.set_xticks(range(len(row)), labels, fontsize=9)
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


def _draw_group(evaluation: Evaluation, axis: Axes, position: int, scores: list[Score]) -> None:
    width = 0.8 / len(scores)
    for number, score in enumerate(scores):
        x, value = position - 0.4 + width * (number + 0.5), 100 * score.score.value
        errors = [[value - 100 * score.score.low], [100 * score.score.high - value]]
        axis.bar(
            x,
            value,
            0.92 * width,
            color=_colour(evaluation, score.model),
            hatch=_HATCHES[evaluation.pooling.index(score.pooling)],
            edgecolor="white",
            linewidth=0.5,
        )
        axis.errorbar(x, value, np.maximum(errors, 0), fmt="none", ecolor="black", elinewidth=1, capsize=2)
        if len(scores) <= 4:
            top = 100 * score.score.high if value >= 0 else max(value, 0)
            axis.annotate(f"{value:.1f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)


def plot_spectrum(evaluation: Evaluation, path: str | Path) -> None:
    """Plot singular values, relative to the largest, to a PNG with one panel for each task.

    A curve that falls early means that the representation uses few directions.
    """
    tasks = [task.name for task in evaluation.tasks]
    figure, axes = _panels(len(tasks), 4.2, 3.4)
    for task, axis in zip(tasks, axes, strict=True):
        for health in (health for health in evaluation.health if health.task == task):
            values = health.singular_values[health.singular_values > 1e-6]
            label = evaluation.short_names[health.model]
            label += f", {health.pooling}" if len(evaluation.pooling) > 1 else ""
            axis.plot(
                range(1, len(values) + 1),
                values,
                _LINES[evaluation.pooling.index(health.pooling)],
                color=_colour(evaluation, health.model),
                label=f"{label} (rank {health.effective_rank:.0f})",
            )
        axis.set_yscale("log")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("number of the singular value")
        axis.set_ylabel("singular value / largest")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle("Singular values of the centered representations, with effective rank", fontsize=11)
    figure.savefig(path, dpi=110)


def plot_embeddings(evaluation: Evaluation, path: str | Path, seed: int = 42) -> None:
    """Plot labelled test samples in two dimensions to a PNG: a row per task, a column per model.

    At most 2,000 samples are shown, with the first pooling. They are reduced to 50 principal
    components, then by t-SNE (van der Maaten and Hinton 2008); fewer than 50 samples are reduced to
    two components. The 20 largest classes have colors.

    Raises:
        ValueError: no task has labels.
    """
    samples = [sample for sample in evaluation.samples if sample.pooling == evaluation.pooling[0]]
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    if not tasks:
        raise ValueError("No task has labels, so there are no samples to plot.")
    figure = _figure(3.6 * len(evaluation.models) + 1.6, 3.5 * len(tasks) + 0.4)
    axes = figure.subplots(len(tasks), len(evaluation.models), squeeze=False)
    for row, task in enumerate(tasks):
        for axis, sample in zip(axes[row], (sample for sample in samples if sample.task == task), strict=True):
            handles = _draw_embeddings(axis, sample, seed)
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


def _draw_embeddings(axis: Axes, sample: LabelledEmbeddings, seed: int) -> tuple[list[Line2D], list[str]]:
    """Draw the points; return handles and labels for a legend."""
    points = _project_2d(sample.vectors, seed)
    area = np.interp(len(points), (200, 2000), (16, 5))
    classes, counts = np.unique(sample.labels, return_counts=True)
    top_classes = sorted(classes[np.argsort(-counts, kind="stable")[:_MAX_CLASSES]], key=_natural_sort_key)
    colormap = matplotlib.colormaps["tab10" if len(top_classes) <= 10 else "tab20"]
    groups = [(sample.labels == name, colormap(number), _short(name)) for number, name in enumerate(top_classes)]
    others = ~np.isin(sample.labels, top_classes)
    if others.any():
        # First, so that it is drawn below the other groups.
        groups.insert(0, (others, to_rgba("lightgrey"), f"{len(classes) - len(top_classes)} other classes"))
    for rows, color, _ in groups:
        axis.scatter(points[rows, 0], points[rows, 1], s=area, color=color, alpha=0.7, linewidths=0)
    axis.set_xticks([])
    axis.set_yticks([])
    handles = [Line2D([], [], marker="o", linestyle="", color=color, markersize=4) for _, color, _ in groups]
    return handles, [label for _, _, label in groups]


def _project_2d(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Reduce vectors to two dimensions: `[N, D]` -> `[N, 2]`."""
    pca_only = len(vectors) < _MIN_FOR_TSNE
    components = min(2 if pca_only else 50, *vectors.shape)
    reduced = PCA(components, random_state=seed).fit_transform(vectors)
    if pca_only or reduced.std() == 0:
        return np.pad(reduced[:, :2], ((0, 0), (0, max(2 - reduced.shape[1], 0))))
    perplexity = min(30, len(vectors) / 4)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def _natural_sort_key(name: str) -> tuple[int, str]:
    """Return a sort key that puts 9 before 10."""
    return (int(name) if name.isdecimal() else -1, name)


def _short(name: str) -> str:
    """Shorten a legend entry; escape dollar signs, which start math in matplotlib."""
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
    for unused in axes[count:]:
        unused.axis("off")
    return figure, axes[:count]
