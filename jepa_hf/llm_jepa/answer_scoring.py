"""Scores of generated answers: equality, numbers and SQL results."""

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
# A query that takes more steps of SQLite's machine than this counts as wrong.
_MOST_SQL_STEPS = 10_000_000
Scorer = Callable[[str, str, dict[str, Any]], bool]


def scorer(metric: str, database: str | Path | None = None) -> Scorer:
    """A function of a generated answer, the right one and its row: whether it counts as right.

    - "exact_match": the same text, blanks around it aside.
    - "prefix_match": it begins with the right answer (LLM-JEPA's `--startswith`).
    - "gsm8k": the same number after the last "####".
    - "sql": the same rows from an SQLite database; in the same order where the right query asks for one.

    Args:
        metric: one of these.
        database: for "sql", a database file, or a folder with `NAME/NAME.sqlite` or `NAME.sqlite`, NAME being the row's
            `db_id`, or what stands in `db_id:[...]` of its question.

    Raises:
        UsageError: another metric, or no database where one is needed.
    """
    if metric == "exact_match":
        return lambda answer, right, row: answer.strip() == right.strip()
    if metric == "prefix_match":
        return lambda answer, right, row: answer.strip().startswith(right.strip())
    if metric == "gsm8k":
        return lambda answer, right, row: _number(answer) is not None and _number(answer) == _number(right)
    if metric == "sql":
        if database is None or not Path(database).exists():
            raise UsageError("the metric sql runs queries: give --database, an SQLite file or a folder of them")
        return lambda answer, right, row: same_result(answer, right, _database(Path(database), row))
    raise UsageError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")


def share_interval(share: float, count: int) -> dict[str, float]:
    """A share of `count` rows and its 95 % interval (Wilson 1927), which says how far other rows might lead.

    >>> {name: round(value, 3) for name, value in share_interval(0.5, 100).items()}
    {'share': 0.5, 'low': 0.404, 'high': 0.596}
    """
    z2 = NormalDist().inv_cdf(0.975) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return {"share": share, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0)}


def _number(answer: str) -> float | None:
    """GSM8K's final number.

    >>> _number("3 * 4 = 12\\n#### 1,012"), _number("12")
    (1012.0, None)
    """
    found = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", answer)
    return float(found[-1].replace(",", "")) if found else None


def _database(place: Path, row: dict[str, Any]) -> Path:
    if place.is_file():
        return place
    name = row.get("db_id")
    if name is None:
        written = " ".join(message["content"] for message in row.get("messages", ())) or str(row.get("text", ""))
        match = re.search(r"db_id:\[([^\]]+)\]", written)
        name = match.group(1) if match else None
    for path in (place / f"{name}" / f"{name}.sqlite", place / f"{name}.sqlite"):
        # A name out of the data must not lead anywhere else.
        if name is not None and re.fullmatch(r"[\w. -]+", name) and path.is_file():
            return path
    raise UsageError(f"{str(place)!r} holds no database {name!r}.sqlite, which a row asks for")


def same_result(query: str, right: str, database: Path) -> bool:
    """Whether two queries give the same rows. The database is opened for reading only; a query that fails is wrong.

    Raises:
        UsageError: the right query fails.
    """
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        connection.text_factory = lambda text: text.decode(errors="replace")
        try:
            expected = _rows(connection, right)
        except sqlite3.Error as error:
            raise UsageError(f"the right query fails on {database}: {error}: {right[:200]}") from None
        try:
            found = _rows(connection, query)
        except (sqlite3.Error, sqlite3.Warning):
            return False
    if re.search(r"\border\s+by\b", right, re.IGNORECASE):
        return found == expected
    return Counter(found) == Counter(expected)


def _rows(connection: sqlite3.Connection, query: str) -> list[tuple]:
    steps = 0

    def watch() -> int:
        nonlocal steps
        steps += 100_000
        return int(steps > _MOST_SQL_STEPS)

    connection.set_progress_handler(watch, 100_000)
    cursor = connection.execute(query)
    if cursor.description is None:  # an empty text runs too, and gives as little as a question without an answer
        raise sqlite3.OperationalError("this is no query")
    return cursor.fetchall()
