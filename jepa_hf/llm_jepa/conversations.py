"""Rows as conversations: messages, prompts with completions, or two columns of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

Message = dict[str, Any]
# Pairs of columns that are read without being named: the project's, and TRL's.
_COLUMN_PAIRS = (("text", "code"), ("prompt", "completion"))


@dataclass(frozen=True)
class Conversation:
    """The messages of a row.

    Args:
        messages: with `role` and `content`, and what else a template reads, such as `tool_calls`;
            the last one is the assistant's.
        name: of the row, for error messages.
        first_answer: index from which the assistant's messages are answers to learn.
        tools: the functions that the template describes to the model, if any.
        has_messages: whether the row had messages, which only a chat template can render.
    """

    messages: list[Message]
    name: str
    first_answer: int = 0
    tools: list[Any] | None = None
    has_messages: bool = True


def read_conversation(
    row: Any, number: int | None = None, text_column: str | None = None, code_column: str | None = None
) -> Conversation:
    """Return the conversation of a row, up to its last answer: nothing is learned from later messages.

    A row has `messages`; or `prompt` and `completion`, as in TRL two texts or two lists of messages, of which only the
    completion is learned; or the texts `text` and `code`. Two texts become a question and its answer.

    Args:
        row: a dictionary.
        number: 0-based number of the row, for error messages.
        text_column: column of the question, which replaces the others.
        code_column: column of the answer, which replaces the others.

    Raises:
        UsageError: the row has none of them, or no answer.
    """
    name = "a row" if number is None else f"row {number + 1}"
    if not isinstance(row, Mapping):
        raise UsageError(f"{name} is a {type(row).__name__}, not a dictionary of columns; give rows with messages")
    if text_column is None and code_column is None:
        if row.get("messages") is not None:
            return _conversation(row, name, row["messages"])
        columns = _text_columns(row, name)
    else:
        columns = (text_column or "text", code_column or "code")
    question, answer = (row.get(column) for column in columns)
    if isinstance(question, list) and isinstance(answer, list):
        return _conversation(row, name, [*question, *answer], len(question))
    for column, value in zip(columns, (question, answer), strict=True):
        if isinstance(value, str) and value.strip():
            continue
        if column in row:
            what = {str: "a blank text", type(None): "no value"}.get(
                type(value), f"{type(value).__name__} {value!r:.40}"
            )
            raise UsageError(f"{name} has {what} in column {column!r}, where a text is expected; fix or remove the row")
        raise UsageError(
            f"{name} has neither messages nor a column {column!r}; name the columns by --text_column_name "
            f"and --code_column_name, out of: {', '.join(map(str, row)) or 'none (the row has no columns)'}"
        )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, name, has_messages=False)


def _text_columns(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the one pair of columns that a row has; else the first one, for the error message."""
    pairs = [pair for pair in _COLUMN_PAIRS if all(row.get(column) is not None for column in pair)]
    if len(pairs) > 1:
        raise UsageError(
            f"{name} has the columns {' and '.join('/'.join(pair) for pair in pairs)}; name those to learn from by "
            "--text_column_name and --code_column_name"
        )
    # A column alone says which pair was meant.
    partial = (pair for pair in _COLUMN_PAIRS if any(column in row for column in pair))
    return pairs[0] if pairs else next(partial, _COLUMN_PAIRS[0])


def _conversation(row: Mapping[str, Any], name: str, messages: Any, first_answer: int = 0) -> Conversation:
    """Check messages, and drop those after the last answer."""
    if not isinstance(messages, Sequence) or not messages or not all(map(_is_message, messages)):
        raise UsageError(f"{name} has no messages of the form {{'role': ..., 'content': ...}}")
    # Columns of a table hold None where another row's message has a value.
    messages = [
        {"content": "", **{key: value for key, value in message.items() if value is not None}} for message in messages
    ]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] < first_answer:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages[first_answer:]))
        raise UsageError(
            f"{name} has no answer: its messages have the roles {roles}, and none is the assistant's; remove the row"
        )
    return Conversation(messages[: answers[-1] + 1], name, first_answer, row.get("tools") or None)


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
