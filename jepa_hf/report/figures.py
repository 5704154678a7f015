"""The pictures of a report: SVGs that follow the reader's light or dark colours."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..monitoring.assessment import History, number
from ..monitoring.training_plots import Panel, draw_panel

# Stands for the colour of text and lines until the SVG is written, where the reader's scheme decides.
_INK = "#010203"
_STYLE = "<style>:root{--ink:#24292f} @media (prefers-color-scheme: dark){:root{--ink:#d4d7dc}}</style>"
_SIZE = (4.6, 3.1)  # inches: readable at the width of a phone
_GREY = "#8c8c8c"
_MOST_LABELS = 10


def panel_svg(panel: Panel, history: History) -> str:
    """The curves of a panel."""
    with _drawing() as (figure, axis):
        draw_panel(axis, panel, history)
        return _svg(figure)


def spectrum_svg(spectra: dict[str, np.ndarray], ranks: dict[str, float]) -> str:
    """Singular values on a logarithmic axis.

    Args:
        spectra: by label, in descending order, in units of the vectors' root mean square length.
        ranks: effective rank by label.
    """
    with _drawing() as (figure, axis):
        styles = (("C0", "-"), ("C1", "--"), (_GREY, "-"))
        for (color, line), (label, values) in zip(styles, spectra.items(), strict=True):
            # Zeros, up to rounding, have no place on the axis.
            values = values[values > 1e-7]
            name = f"{label} (effective rank {number(ranks[label])})"
            axis.plot(range(1, len(values) + 1), values, line, color=color, label=name)
        axis.set_yscale("log")
        axis.set_xlabel("direction, by size")
        axis.set_ylabel("singular value / length of the vectors", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        return _svg(figure)


def map_svg(points: np.ndarray, labels: Sequence[str] | None) -> str:
    """One dot per sample, coloured by the most frequent labels.

    Args:
        points: `[N, 2]`.
        labels: of the samples, or None.
    """
    with _drawing((4.6, 4.2)) as (figure, axis):
        style = {"s": 10, "alpha": 0.7, "linewidths": 0}
        if labels is None:
            axis.scatter(*points.T, color="C0", **style)
        else:
            _draw_labels(axis, points, np.array(labels), style)
        axis.set_xticks([])
        axis.set_yticks([])
        return _svg(figure)


def _draw_labels(axis: Axes, points: np.ndarray, labels: np.ndarray, style: dict[str, float]) -> None:
    counted = Counter(labels.tolist())
    # One colour goes to the others, where there are any.
    frequent = [label for label, _ in counted.most_common(_MOST_LABELS - (len(counted) > _MOST_LABELS))]
    shown = [(label, f"C{at}", labels == label) for at, label in enumerate(sorted(frequent))]
    others = ~np.isin(labels, frequent)
    for label, color, chosen in [*shown, ("others", _GREY, others)]:
        if chosen.any():
            axis.scatter(*points[chosen].T, color=color, label=_plain(label), **style)
    axis.legend(fontsize=7, markerscale=2, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.02))


def _plain(label: str) -> str:
    """A short label that SVG can hold: dollar signs would be mathematics, a leading underscore hides the entry."""
    printable = "".join(char if char.isprintable() else " " for char in label)
    short = printable if len(printable) <= 24 else f"{printable[:23]}…"
    return " " + short.replace("$", r"\$")


@contextmanager
def _drawing(size: tuple[float, float] = _SIZE) -> Iterator[tuple[Figure, Axes]]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    settings = dict.fromkeys(inked, _INK) | {
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
    # Without a date equal runs give equal pages.
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, tag, rest = file.getvalue().partition("<defs>")
    return f"{head}{_STYLE}{tag}{rest}".replace(_INK, "var(--ink)")
