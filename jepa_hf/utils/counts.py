"""Counts in messages, a sample of rows, and one sentence for rows that are left out, by reason."""

from collections.abc import Mapping

import numpy as np


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in singular or plural.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def describe_counts(reasons: Mapping[str, int]) -> str:
    """Return such as "2 without text, 1 too short"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def left_out_message(reasons: Mapping[str, int], total: int, noun: str = "rows") -> str:
    """Return such as "left out 3 of 12 rows: 2 without text, 1 too short"."""
    return f"left out {sum(reasons.values()):,} of {total:,} {noun}: {describe_counts(reasons)}"


def evenly_spaced(size: int, limit: int) -> list[int]:
    """Return at most `limit` different indices below `size`, evenly spaced from the first to the last.

    >>> evenly_spaced(9, 3), evenly_spaced(2, 3), evenly_spaced(0, 3)
    ([0, 4, 8], [0, 1], [])
    """
    return np.linspace(0, max(size - 1, 0), min(size, limit)).astype(int).tolist()
