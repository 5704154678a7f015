"""Counts of rows that give no text, by reason, and the sentence about them."""

import logging
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..utils.counts import left_out_message
from .file_readers import log_once

logger = logging.getLogger(__name__)


class DroppedRows:
    """Count rows with and without usable text; `source` describes the data.

    Of a `running` stream, whose end may not be reached, the count so far is logged when 10, 100 and so on rows are
    dropped, and each sentence once in a process.
    """

    def __init__(self, source: str, running: bool = False):
        self.source, self.running = source, running
        self.restart()

    def restart(self) -> None:
        """Count from 0, for the next pass over a stream."""
        self.total = 0
        self.reasons: Counter[str] = Counter()

    @property
    def kept(self) -> int:
        """Number of rows that were not dropped."""
        return self.total - self.reasons.total()

    def add(self, reason: str | None, count: int = 1) -> None:
        """Add rows, dropped for this reason or, with None, kept."""
        self.total += count
        if reason is not None:
            self.drop(reason, count)

    def drop(self, reason: str, count: int) -> None:
        """Drop rows that were added as kept."""
        digits = len(str(self.reasons.total()))
        self.reasons[reason] += count
        if self.running and len(str(self.reasons.total())) > digits:
            self.log(" so far")

    def add_texts(self, dataset: Dataset, column: str) -> None:
        """Add the rows of a map-style data set, of which null and blank texts are dropped."""
        nulls = blanks = 0
        for batch in dataset.with_format("arrow").iter(10_000):
            texts = batch.column(column).cast(pa.large_string())
            nulls += texts.null_count
            blanks += pc.sum(pc.or_(pc.utf8_is_space(texts), pc.equal(texts, ""))).as_py() or 0
        self.add(None, len(dataset) - nulls - blanks)
        self.add("null", nulls)
        self.add("blank", blanks)

    def log(self, suffix: str = "") -> None:
        """Log the dropped rows, if there are any; a warning if they are more than half."""
        dropped = self.reasons.total()
        if not dropped:
            return
        is_most = 2 * dropped > self.total
        message = left_out_message(self.reasons, self.total, f"rows of {self.source}{suffix}")
        if is_most:
            message += "; more than half, so check the file and --text_column_name"
        level = logging.WARNING if is_most else logging.INFO
        if self.running:  # a stream repeats itself in each pass
            log_once(message, level)
        else:
            logger.log(level, message)


def reason_to_drop(text: Any) -> str | None:
    """Return why a row with this text is dropped; None if it is not."""
    if text is None:
        return "null"
    return None if text.strip() else "blank"
