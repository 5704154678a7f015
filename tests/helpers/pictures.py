"""Rendering of figures into files, which takes half of a short run's time: only where a test looks at the picture."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from unittest import mock

from matplotlib.figure import Figure

_render = Figure.savefig


def _write_placeholder(figure: Figure, file: str | Path | IO[Any], **options: Any) -> None:
    if isinstance(file, str | Path):
        Path(file).write_text("a figure that was not rendered")
    else:
        _render(figure, file, **options)


def render_nothing() -> None:
    """From here on, figures are made, but their files hold a placeholder."""
    Figure.savefig = _write_placeholder


@contextlib.contextmanager
def rendered() -> Iterator[None]:
    """Render figures inside."""
    with mock.patch.object(Figure, "savefig", _render):
        yield
