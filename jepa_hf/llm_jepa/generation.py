"""What a causal language model answers, and whether that is right."""

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from .view_tokenizer import PairedViewTokenizer

METRICS = ("exact_match", "prefix_match", "gsm8k", "sql")

# A query that takes more steps of SQLite's machine than this counts as wrong.
_MOST_SQL_STEPS = 10_000_000

Scorer = Callable[[str, str, dict[str, Any]], bool]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    show_progress: bool = False,
) -> list[str]:
    """Greedy answers, in batches of prompts of like length.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        tokenizer: its tokenizer, whichever side it pads on.
        prompts: what the model is to go on from, special tokens written out (see `PairedViewTokenizer.prompt`).
        max_new_tokens: most tokens of an answer; fewer where the model has not so many positions.
        batch_size: prompts that are answered together.
        show_progress: show a bar.

    Returns:
        The answers without special tokens and without blanks around them, in the order of the prompts.

    Raises:
        UsageError: a prompt leaves no room for an answer, see `room_for`.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    room_for(model.config, max(map(len, encoded), default=0), max_new_tokens)  # before the first is answered
    order = sorted(range(len(prompts)), key=lambda at: -len(encoded[at]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops = _stop_tokens(model, tokenizer)
    training, answers = model.training, [""] * len(prompts)
    model.eval()
    bar = tqdm(total=len(prompts), desc="generating", unit=" answers", disable=not show_progress, leave=False)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = max(len(encoded[at]) for at in chosen)
        ids = torch.tensor([[pad] * (width - len(encoded[at])) + encoded[at] for at in chosen], device=model.device)
        real = torch.tensor([[0] * (width - len(encoded[at])) + [1] * len(encoded[at]) for at in chosen])
        found = model.generate(
            input_ids=ids,
            attention_mask=real.to(model.device),
            max_new_tokens=room_for(model.config, width, max_new_tokens),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=stops,
        )
        for at, answer in zip(chosen, found[:, width:], strict=True):
            answers[at] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        bar.update(len(chosen))
    bar.close()
    model.train(training)
    return answers


def room_for(config: PreTrainedConfig, length: int, max_new_tokens: int) -> int:
    """How many tokens an answer to a prompt of `length` tokens may have: `max_new_tokens`, or what positions are left.

    Raises:
        UsageError: none are left.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if length >= positions:
        raise UsageError(
            f"a prompt has {length} tokens, and the model {positions} positions, which leaves none for an answer; "
            "leave the row out"
        )
    return min(max_new_tokens, positions - length)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those that end an answer: the tokenizer's, which training taught, and those that the model came with."""
    own = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in known if token is not None)


# ---- right or wrong


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


def judge(
    model: PreTrainedModel,
    view_tokenizer: PairedViewTokenizer,
    rows: Sequence[dict[str, Any]],
    metrics: Sequence[str] = ("exact_match", "prefix_match"),
    database: str | Path | None = None,
    **kwargs: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer the prompts of rows and score the answers.

    Args:
        rows: with messages, or with the two columns; the answer is the message that is the second view.
        metrics: see `scorer`.
        database: for "sql".
        kwargs: of `generate_answers`.

    Returns:
        By metric the share that is right; and for each row `prompt`, `answer`, `right` and each metric's verdict.
    """
    scorers = {metric: scorer(metric, database) for metric in metrics}
    asked = [view_tokenizer.prompt(row, number) for number, row in enumerate(rows)]
    answers = generate_answers(model, view_tokenizer.tokenizer, [prompt for prompt, _ in asked], **kwargs)
    found = [
        {
            "prompt": prompt,
            "answer": answer,
            "right": right,
            **{metric: bool(of(answer, right, row)) for metric, of in scorers.items()},
        }
        for (prompt, right), answer, row in zip(asked, answers, rows, strict=True)
    ]
    return {metric: sum(row[metric] for row in found) / max(len(found), 1) for metric in metrics}, found
