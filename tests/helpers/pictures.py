"""Figures of runs, which take half of a short run's time: drawn and rendered only where a test looks at the picture."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure

from jepa_hf.monitoring import mask_plots, training_plots

_render, _draw_masks = Figure.savefig, mask_plots._draw
_Figure, _Canvas = training_plots.Figure, training_plots.FigureCanvasAgg


def _write_placeholder(figure: Any, file: str | Path | IO[Any], **options: Any) -> None:
    if isinstance(file, str | Path):
        Path(file).write_text("a figure that was not rendered")
    else:
        _render(figure, file, **options)


class _NothingDrawn:
    """A figure without axes."""

    savefig = _write_placeholder

    def __init__(self, *args: Any, **options: Any):
        pass

    def subplots(self, rows: int, columns: int) -> np.ndarray:
        return np.empty((0, columns))


def render_nothing() -> None:
    """From here on, masks and curves are not drawn, other figures not rendered; their files hold a placeholder."""
    Figure.savefig = _write_placeholder
    training_plots.Figure = training_plots.FigureCanvasAgg = mask_plots._draw = _NothingDrawn


@contextlib.contextmanager
def rendered() -> Iterator[None]:
    """Draw and render figures inside."""
    with (
        mock.patch.object(Figure, "savefig", _render),
        mock.patch.multiple(training_plots, Figure=_Figure, FigureCanvasAgg=_Canvas),
        mock.patch.object(mask_plots, "_draw", _draw_masks),
    ):
        yield
