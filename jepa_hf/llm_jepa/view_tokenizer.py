"""Tokenization of conversations or column pairs: token ids, answer labels, and two views."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError

PREDICTOR_TOKEN = "<|predictor_{}|>"
MAX_PREDICTOR_TOKENS = 10
IGNORE_INDEX = -100

Message = dict[str, str]


def predictor_tokens(count: int) -> list[str]:
    """Return the k special tokens of the predictor, in the order of the official code.

    >>> predictor_tokens(2)
    ['<|predictor_2|>', '<|predictor_1|>']
    """
    return [PREDICTOR_TOKEN.format(number) for number in range(count, 0, -1)]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all special tokens: named ones, such as `eos_token`, and added ones."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


@dataclass(frozen=True)
class View:
    """One view of a row: its token ids, and the index of the token whose state represents it."""

    input_ids: list[int]
    end_index: int


class PairedViewTokenizer:
    """Tokenize chat messages or two columns into rows for `DataCollatorForPairedViews`.

    Each view is one message of the conversation, rendered by the chat template (LLM-JEPA, section
    3.1: Text and Code). The predictor tokens follow or precede the content of the predicting view.
    Character offsets separate the content from the text that the template adds.

    Args:
        tokenizer: a fast tokenizer. With `num_predictor_tokens` above 0 it must contain
            `predictor_tokens`, see `add_predictor_tokens`. Without a chat template, only columns
            are supported: text, a newline, code.
        max_length: maximum number of tokens of a row and of a view. A longer row is truncated at
            its end, a longer view at the end of its content.
        text_turn: index of the message that is the first view; negative values count from the end.
        code_turn: index of the message that is the second view.
        text_column: column of the first view, for rows without `messages`.
        code_column: column of the second view, for rows without `messages`.
        num_predictor_tokens: k, 0 to 10; with 0 the state of the content's last token is the
            prediction.
        predictor_position: "end" or "start" of the predicting view's content.
        reverse: whether the second view predicts the first.
        train_on_prompt: whether all tokens except stop tokens have labels, as in the official code.
            Otherwise only answers have, including their stop token.

    Raises:
        UsageError: a slow tokenizer, missing predictor tokens, or an argument out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        text_turn: int = -2,
        code_turn: int = -1,
        text_column: str = "text",
        code_column: str = "code",
        num_predictor_tokens: int = 1,
        predictor_position: str = "end",
        reverse: bool = False,
        train_on_prompt: bool = False,
    ):
        if not tokenizer.is_fast:
            raise UsageError(
                f"Paired views need a fast tokenizer, got {type(tokenizer).__name__}. Load the fast version."
            )
        if not 0 <= num_predictor_tokens <= MAX_PREDICTOR_TOKENS:
            raise UsageError(
                f"num_predictor_tokens must be between 0 and {MAX_PREDICTOR_TOKENS}, got {num_predictor_tokens}."
            )
        if predictor_position not in ("end", "start"):
            raise UsageError(f"predictor_position must be end or start, got {predictor_position!r}.")
        if max_length < num_predictor_tokens + 2:
            raise UsageError(
                f"max_length (--max_seq_length) {max_length} leaves no room for text with {num_predictor_tokens} "
                "predictor tokens. Increase it."
            )
        self.predictors = predictor_tokens(num_predictor_tokens)
        missing = [token for token in self.predictors if token not in tokenizer.get_added_vocab()]
        if missing:
            raise UsageError(f"The tokenizer does not contain {missing[0]}: call add_predictor_tokens first.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.turns = (text_turn, code_turn)
        self.columns = (text_column, code_column)
        self.predictor_position = predictor_position
        self.reverse = reverse
        self.train_on_prompt = train_on_prompt

    def __call__(self, row: Mapping[str, Any], number: int | None = None) -> dict[str, Any]:
        """Tokenize one row.

        Args:
            row: `messages`, a list of dictionaries with `role` and `content`; or the two columns.
            number: 0-based number of the row, for error messages.

        Returns:
            `input_ids` and `labels`; `stp_span`, the positions of the first token of the first
            view's message and of the last token of an answer's content; `text_input_ids` and
            `text_end` of the predicting view; `code_input_ids` and `code_end` of the predicted one;
            `truncated`, whether a part was truncated.

        Raises:
            UsageError: a row without the messages or columns, no chat template for messages, a
                template that changes or omits content, an empty view, or an answer beyond
                `max_length`.
        """
        label = _row_label(number)
        messages = self._messages(row, label)
        text, spans = self._render_with_spans(messages, label)
        ids, labels, content, truncated = self._tokens(text, spans, label)
        turns = self.turns[::-1] if self.reverse else self.turns
        first, first_truncated = self._view(messages, turns[0], self.predictors, label)
        second, second_truncated = self._view(messages, turns[1], [], label)
        return {
            "input_ids": ids,
            "labels": labels,
            "stp_span": content,
            "text_input_ids": first.input_ids,
            "text_end": first.end_index,
            "code_input_ids": second.input_ids,
            "code_end": second.end_index,
            "truncated": truncated or first_truncated or second_truncated,
        }

    def prompt(self, row: Mapping[str, Any], number: int | None = None) -> tuple[str, str]:
        """Return the rendered prompt, up to where the answer begins, and the reference answer.

        Raises:
            UsageError: as for `__call__`.
        """
        label = _row_label(number)
        messages = self._messages(row, label)
        turn = self.turns[1] % len(messages)
        try:
            return self._render(messages[:turn], add_generation_prompt=True), messages[turn]["content"]
        except TemplateError as error:
            raise _template_error(label, error) from None

    # ---- the conversation

    def _messages(self, row: Mapping[str, Any], label: str) -> list[Message]:
        """Return the messages of a row; two columns become a question and its answer."""
        if row.get("messages") is not None:
            return self._checked_messages(row["messages"], label)
        for name in self.columns:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UsageError(
                    f"{label} has neither messages nor a text in column {name!r}; name the columns by "
                    f"--text_column_name and --code_column_name, out of: {', '.join(map(str, row))}"
                )
        text, code = (row[name] for name in self.columns)
        return [{"role": "user", "content": text}, {"role": "assistant", "content": code}]

    def _checked_messages(self, messages: Any, label: str) -> list[Message]:
        if self.tokenizer.chat_template is None:
            raise UsageError(
                "The tokenizer has no chat template, but the rows have messages. Give --chat_template_path, a model "
                "with a chat template, or data with two columns."
            )
        is_valid = isinstance(messages, Sequence) and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
        if not is_valid or not messages:
            raise UsageError(f"{label} has no messages of the form {{'role': ..., 'content': ...}}")
        for turn in self.turns:
            if not -len(messages) <= turn < len(messages):
                raise UsageError(
                    f"{label} has {len(messages)} messages, so turn {turn} cannot be a view; change --text_turn or "
                    "--code_turn, or remove the row"
                )
            if not messages[turn]["content"].strip():
                raise UsageError(f"{label} has an empty message {turn}, which cannot be a view; remove the row")
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def _render(self, messages: list[Message], **kwargs: Any) -> str:
        """Render messages by the chat template, or columns without one."""
        if self.tokenizer.chat_template is not None:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        parts = [bos] if messages else []
        for message in messages:
            parts.append(message["content"] + ("\n" if message["role"] == "user" else eos))
        return "".join(parts)

    def _render_with_spans(self, messages: list[Message], label: str) -> tuple[str, list[tuple[int, int, int]]]:
        """Render a conversation and locate its answers.

        Returns:
            The text, and character offsets (start, end of the content, end) of each answer. The
            first entry is not an answer but the content of the message that is the first view.
        """
        try:
            text = self._render(messages)
            content = messages[self.turns[0]]["content"].strip()
            start = max(text.rfind(content), 0)
            spans = [(start, start + len(content), start + len(content))]
            answer_role = messages[self.turns[1]]["role"]
            for index, message in enumerate(messages):
                if message["role"] != answer_role:
                    continue
                prompt = self._render(messages[:index], add_generation_prompt=True)
                through = self._render(messages[: index + 1])
                if not text.startswith(prompt) or not through.startswith(prompt):
                    raise UsageError(
                        f"the chat template does not render {label} turn by turn, so its answers cannot be separated "
                        "from its prompts; give --chat_template_path, or data with two columns"
                    )
                content = message["content"].strip()
                start = through.find(content, len(prompt))
                content_end = start + len(content) if start >= 0 else len(prompt)
                spans.append((len(prompt), content_end, len(through)))
        except TemplateError as error:
            raise _template_error(label, error) from None
        return text, spans

    def _tokens(
        self, text: str, spans: list[tuple[int, int, int]], label: str
    ) -> tuple[list[int], list[int], list[int], bool]:
        """Return ids, labels, first and last content position, and whether the row is truncated."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        (first_start, _, _), *answers = spans
        content_stop = answers[-1][1]
        inside = [index for index, (start, end) in enumerate(offsets) if end > first_start and start < content_stop]
        if self.train_on_prompt:
            labels = [IGNORE_INDEX if token == self.tokenizer.eos_token_id else token for token in ids]
        else:
            labels = _answer_labels(ids, offsets, answers, special_ids(self.tokenizer))
        truncated = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(target == IGNORE_INDEX for target in labels):
            raise UsageError(
                f"{label} has no answer within its first {self.max_length} tokens; increase max_length "
                "(--max_seq_length), or remove the row"
            )
        return ids, labels, [inside[0], min(inside[-1], len(ids) - 1)], truncated

    # ---- the views

    def _view(self, messages: list[Message], turn: int, predictors: list[str], label: str) -> tuple[View, bool]:
        """Tokenize one message with the predictor tokens, truncated to `max_length`."""
        index = turn % len(messages)
        content = messages[index]["content"].strip()
        tokens = "".join(predictors)
        at_end = self.predictor_position == "end"
        marked_content = content + tokens if at_end else tokens + content
        text = self._render_message(messages[:index], {**messages[index], "content": marked_content}, label)
        start = text.rfind(marked_content)
        if start < 0:
            raise UsageError(
                f"the chat template changes the content of message {turn} of {label}; give --chat_template_path, or "
                "other data"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        stop = start + len(marked_content)
        inside = [number for number, offset in enumerate(offsets) if offset[0] < stop and offset[1] > start]
        begin, end = inside[0], inside[-1]
        excess = len(ids) - self.max_length
        if excess > 0:
            # Cut the end of the content; keep the predictor tokens and the text that the template
            # adds.
            last = end - (len(predictors) if at_end else 0)
            if last - excess < begin + (0 if at_end else len(predictors)):
                raise UsageError(
                    f"{label} has nothing left of message {turn} within {self.max_length} tokens; increase max_length "
                    "(--max_seq_length)"
                )
            ids = ids[: last - excess + 1] + ids[last + 1 :]
            end -= excess
        return View(ids, end), excess > 0

    def _render_message(self, history: list[Message], message: Message, label: str) -> str:
        """Render one message: as the next turn, else alone, else alone with the role "user"."""
        bos = self.tokenizer.bos_token
        for earlier, last in ((history, message), ([], message), ([], {**message, "role": "user"})):
            try:
                prefix = self._render(earlier) if earlier else ""
                through = self._render([*earlier, last])
            except TemplateError:
                continue
            if through.startswith(prefix):
                text = through[len(prefix) :]
                needs_bos = bos is not None and through.startswith(bos) and not text.startswith(bos)
                return bos + text if needs_bos else text
        raise UsageError(f"the chat template cannot render a single message of {label}; give data with two columns")


def _row_label(number: int | None) -> str:
    """Return the name of a row in error messages, counted from 1."""
    return "a row" if number is None else f"row {number + 1}"


def _template_error(label: str, error: TemplateError) -> UsageError:
    return UsageError(f"the chat template rejects {label}: {' '.join(str(error).split())}; change or remove the row")


def _answer_labels(
    ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int, int]], special: set[int]
) -> list[int]:
    """Label the tokens of each answer up to its first special token, the end of the turn."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, content_end, stop in answers:
        for index, (token, (offset, _)) in enumerate(zip(ids, offsets, strict=True)):
            if not start <= offset < stop:
                continue
            labels[index] = token
            if offset >= content_end and token in special:
                break  # template text after the end-of-turn token is not a target
    return labels
