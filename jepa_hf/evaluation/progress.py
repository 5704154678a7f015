"""Progress of long loops: a bar in a terminal or a notebook, else a log line every half minute."""

import logging
import sys
from typing import Any

from tqdm import tqdm as std_tqdm
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_LINE_INTERVAL_S = 30
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {remaining} left"


def progress_bar(total: int, description: str, unit: str, show: bool = True) -> std_tqdm:
    """Return a context manager with `update(count)` that shows progress, in units of a plural name."""
    kind = tqdm if sys.stderr.isatty() or "ipykernel" in sys.modules else _ProgressLines
    return kind(total=total, desc=description, unit=f" {unit}", disable=not show, leave=False)


class _ProgressLines(std_tqdm):
    """Log lines instead of a bar; none for work that ends before the first one is due."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            **kwargs, bar_format=_LINE, mininterval=_LINE_INTERVAL_S, delay=_LINE_INTERVAL_S, miniters=1, ascii=True
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Log the progress; an empty message, which would clear a bar, is nothing to log."""
        if msg is None:
            logger.info("%s", self)
        return True
