"""Scoring of generated answers: text equality, GSM8K numbers, SQL results."""

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..errors import UsageError

METRICS = ("exact_match", "prefix_match", "gsm8k", "sql")
# Steps of SQLite's virtual machine; a query that needs more counts as wrong.
_MAX_SQL_STEPS = 10_000_000
Scorer = Callable[[str, str, dict[str, Any]], bool]


def get_scorer(metric: str, database: str | Path | None = None) -> Scorer:
    """Return a function of (answer, reference, row) that decides whether the answer is correct.

    - "exact_match": the texts are equal up to surrounding whitespace.
    - "prefix_match": the answer starts with the reference (LLM-JEPA's `--startswith`).
    - "gsm8k": the numbers after the last "####" are equal.
    - "sql": both queries return the same rows from an SQLite database; in the same order if the
      reference has ORDER BY.

    The `database` for "sql" is a file, or a folder with `NAME/NAME.sqlite` or `NAME.sqlite`. NAME is the row's `db_id`,
    or the value of `db_id:[...]` in its question.

    Raises:
        UsageError: an unknown metric, or "sql" without a database.
    """
    if metric == "exact_match":
        return lambda answer, reference, row: answer.strip() == reference.strip()
    if metric == "prefix_match":
        return lambda answer, reference, row: answer.strip().startswith(reference.strip())
    if metric == "gsm8k":
        return lambda answer, reference, row: (
            _gsm8k_answer(answer) is not None and _gsm8k_answer(answer) == _gsm8k_answer(reference)
        )
    if metric == "sql":
        if database is None or not Path(database).exists():
            raise UsageError(
                f"Metric sql runs queries: give --database, an SQLite file or a folder of SQLite files; got {database}."
            )
        return lambda answer, reference, row: sql_results_match(answer, reference, _database(Path(database), row))
    raise UsageError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")


def wilson_interval(share: float, count: int) -> dict[str, float]:
    """Compute the 95 % confidence interval of a proportion of `count` rows (Wilson 1927).

    >>> {name: round(value, 3) for name, value in wilson_interval(0.5, 100).items()}
    {'share': 0.5, 'low': 0.404, 'high': 0.596}
    """
    z2 = NormalDist().inv_cdf(0.975) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return {"share": share, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0)}


def _gsm8k_answer(answer: str) -> float | None:
    r"""Return GSM8K's final number.

    >>> _gsm8k_answer("3 * 4 = 12\n#### 1,012"), _gsm8k_answer("12")
    (1012.0, None)
    """
    numbers = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", answer)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _database(path: Path, row: dict[str, Any]) -> Path:
    if path.is_file():
        return path
    name = row.get("db_id")
    if name is None:
        text = " ".join(message["content"] for message in row.get("messages", ()))
        text = text or str(row.get("text", row.get("prompt", "")))
        match = re.search(r"db_id:\[([^\]]+)\]", text)
        name = match.group(1) if match else None
    for file in (path / f"{name}" / f"{name}.sqlite", path / f"{name}.sqlite"):
        # The name comes from the data: reject path separators.
        if name is not None and re.fullmatch(r"[\w. -]+", name) and file.is_file():
            return file
    raise UsageError(
        f"{str(path)!r} holds no database {name!r}.sqlite, which a row refers to. Add the file or remove the row."
    )


def sql_results_match(query: str, reference: str, database: Path) -> bool:
    """Return whether two queries return the same rows of a database, opened read-only.

    Raises:
        UsageError: the reference query fails.
    """
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        connection.text_factory = lambda data: data.decode(errors="replace")
        try:
            expected = _rows(connection, reference)
        except sqlite3.Error as error:
            raise UsageError(
                f"The reference query fails on {database}: {error}: {reference[:200]} Fix the query or remove its row."
            ) from None
        try:
            rows = _rows(connection, query)
        except (sqlite3.Error, sqlite3.Warning):
            return False
    if re.search(r"\border\s+by\b", reference, re.IGNORECASE):
        return rows == expected
    return Counter(rows) == Counter(expected)


def _rows(connection: sqlite3.Connection, query: str) -> list[tuple]:
    steps = 0

    def exceeds_limit() -> int:
        nonlocal steps
        steps += 100_000
        return int(steps > _MAX_SQL_STEPS)

    connection.set_progress_handler(exceeds_limit, 100_000)
    cursor = connection.execute(query)
    if cursor.description is None:  # empty text also executes, and would match an empty result
        raise sqlite3.OperationalError("not a query")
    return cursor.fetchall()
