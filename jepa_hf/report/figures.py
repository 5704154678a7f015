"""Figures of a report, as SVGs that follow the reader's light or dark color scheme."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..monitoring.assessment import History
from ..monitoring.training_plots import Panel, draw_panel
from ..utils.formatting import format_number

# Placeholder for the color of text and lines; the SVG takes that of the reader's color scheme.
_TEXT_COLOR_PLACEHOLDER = "#010203"
_STYLE = "<style>:root{--ink:#24292f} @media (prefers-color-scheme: dark){:root{--ink:#d4d7dc}}</style>"
_SIZE = (4.6, 3.1)  # inches; readable at the width of a phone
_GREY = "#8c8c8c"
_MAX_LABELS = 10


def panel_svg(panel: Panel, history: History) -> str:
    """Draw the curves of a panel."""
    with _drawing() as (figure, axis):
        draw_panel(axis, panel, history)
        return _svg(figure)


def spectrum_svg(spectra: dict[str, np.ndarray], ranks: dict[str, float]) -> str:
    """Draw descending singular values, over the vectors' Frobenius norm, and effective ranks by label."""
    with _drawing() as (figure, axis):
        styles = (("C0", "-"), ("C1", "--"), (_GREY, "-"))
        for (color, line), (label, values) in zip(styles, spectra.items(), strict=True):
            # A logarithmic axis has no zero; smaller values are rounding errors.
            values = values[values > 1e-7]
            name = f"{label} (effective rank {format_number(ranks[label])})"
            axis.plot(range(1, len(values) + 1), values, line, color=color, label=name)
        axis.set_yscale("log")
        axis.set_xlabel("number of the singular value")
        axis.set_ylabel("singular value / norm of the vectors", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        return _svg(figure)


def scatter_svg(points: np.ndarray, labels: Sequence[str] | None) -> str:
    """Draw one dot per sample at `points`, `[N, 2]`, colored by the most frequent labels."""
    with _drawing((4.6, 4.2)) as (figure, axis):
        if labels is None:
            _draw_dots(axis, points, "C0")
        else:
            _draw_labels(axis, points, np.array(labels))
        axis.set_xticks([])
        axis.set_yticks([])
        return _svg(figure)


def _draw_labels(axis: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    counts = Counter(labels.tolist())
    # If there are more labels than colors, the last color is that of all others.
    frequent = [label for label, _ in counts.most_common(_MAX_LABELS - (len(counts) > _MAX_LABELS))]
    for index, label in enumerate(sorted(frequent)):
        _draw_dots(axis, points[labels == label], f"C{index}", label)
    others = ~np.isin(labels, frequent)
    if others.any():
        _draw_dots(axis, points[others], _GREY, "others")
    axis.legend(fontsize=7, markerscale=2, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.02))


def _draw_dots(axis: Axes, points: np.ndarray, color: str, label: str = "") -> None:
    axis.scatter(points[:, 0], points[:, 1], s=10, alpha=0.7, linewidths=0, color=color, label=_legend_label(label))


def _legend_label(label: str) -> str:
    """Shorten a legend entry; escape dollar signs (math) and leading underscores (hidden)."""
    printable = "".join(char if char.isprintable() else " " for char in label)
    short = printable if len(printable) <= 24 else f"{printable[:23]}…"
    return " " + short.replace("$", r"\$")


@contextmanager
def _drawing(size: tuple[float, float] = _SIZE) -> Iterator[tuple[Figure, Axes]]:
    themed = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = dict.fromkeys(themed, _TEXT_COLOR_PLACEHOLDER) | {
        "svg.fonttype": "none",
        "svg.hashsalt": "jepa_hf",
        "legend.facecolor": "none",
        "legend.edgecolor": "none",
        "font.size": 9,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    # No date, so that equal runs give equal pages.
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, tag, rest = file.getvalue().partition("<defs>")
    return f"{head}{_STYLE}{tag}{rest}".replace(_TEXT_COLOR_PLACEHOLDER, "var(--ink)")
