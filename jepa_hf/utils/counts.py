"""One sentence for rows that are left out, by reason."""

from collections.abc import Mapping


def describe_counts(reasons: Mapping[str, int]) -> str:
    """Return such as "2 without text, 1 too short"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def left_out_message(reasons: Mapping[str, int], total: int, noun: str = "rows") -> str:
    """Return such as "left out 3 of 12 rows: 2 without text, 1 too short".

    Args:
        reasons: number of rows by reason.
        total: number of all rows.
        noun: plural name of a row.
    """
    return f"left out {sum(reasons.values()):,} of {total:,} {noun}: {describe_counts(reasons)}"
