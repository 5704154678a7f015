"""From a conversation, or two columns, to token ids: the whole row with its answers marked, and two views of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError

PREDICTOR_TOKEN = "<|predictor_{}|>"
MOST_PREDICTOR_TOKENS = 10
IGNORED = -100

Message = dict[str, str]


def predictor_tokens(count: int) -> list[str]:
    """The special tokens that stand for the predictor, in the order in which a view holds them (official code).

    >>> predictor_tokens(2)
    ['<|predictor_2|>', '<|predictor_1|>']
    """
    return [PREDICTOR_TOKEN.format(number) for number in range(count, 0, -1)]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: those with a name, such as `eos_token`, and those that were added as special ones."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


@dataclass(frozen=True)
class View:
    """One view of a row: its token ids, and the index of the token whose representation stands for it."""

    input_ids: list[int]
    end: int


class PairedViewTokenizer:
    """Makes rows for `DataCollatorForPairedViews` out of chat messages or of two columns.

    The first view holds one message of the conversation, the second another one (LLM-JEPA, section 3.1: Text and Code),
    each as the chat template writes it; the predictor tokens stand at the end of the first one's content, or before
    it. Where the template's own writing begins and ends is found by character offsets, so no index is set by hand.

    Args:
        tokenizer: a fast one. With `num_predictor_tokens` above 0 it must know `predictor_tokens`, see
            `add_predictor_tokens`. Without a chat template only columns can be read: text, a newline, code.
        max_length: most tokens of a row and of a view. A longer row loses its end, a longer view the end of its
            content.
        text_turn, code_turn: which messages are the views, counted as Python counts; default the last but one and the
            last.
        text_column, code_column: columns of rows without `messages`.
        num_predictor_tokens: k, 0 to 10; with 0 the representation of the content's last token is the prediction.
        predictor_position: "end" or "start" of the first view's content.
        reverse: the second view predicts the first.
        train_on_prompt: the next-token loss is on all tokens but stop tokens, as in the official code, whose collator
            replaces the labels; default on answers, stop token included.

    Raises:
        UsageError: a slow tokenizer, or numbers and choices that cannot be.
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
                f"paired views need a fast tokenizer, which {type(tokenizer).__name__} is not; load the fast version"
            )
        if not 0 <= num_predictor_tokens <= MOST_PREDICTOR_TOKENS:
            raise UsageError(
                f"num_predictor_tokens must lie between 0 and {MOST_PREDICTOR_TOKENS}, not {num_predictor_tokens}"
            )
        if predictor_position not in ("end", "start"):
            raise UsageError(f"predictor_position must be end or start, not {predictor_position!r}")
        if max_length < num_predictor_tokens + 2:
            raise UsageError(
                f"max_length (--max_seq_length) {max_length} leaves no room for text beside {num_predictor_tokens} "
                "predictor tokens; make it larger"
            )
        self.predictors = predictor_tokens(num_predictor_tokens)
        unknown = [token for token in self.predictors if token not in tokenizer.get_added_vocab()]
        if unknown:
            raise UsageError(f"the tokenizer does not know {unknown[0]}: call add_predictor_tokens first")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.turns = (text_turn, code_turn)
        self.columns = (text_column, code_column)
        self.predictor_position = predictor_position
        self.reverse = reverse
        self.train_on_prompt = train_on_prompt

    def __call__(self, row: Mapping[str, Any], number: int | None = None) -> dict[str, Any]:
        """One row.

        Args:
            row: `messages`, a list of dictionaries with `role` and `content`; or the two columns.
            number: what errors call it.

        Returns:
            `input_ids` and `labels`; `content`, the first token of the first view's message and the last token of an
            answer's content; `text_input_ids` and `text_end`, `code_input_ids` and `code_end`: the view that predicts
            first; and `truncated`, whether anything was cut.

        Raises:
            UsageError: a row without the messages or columns, no chat template for messages, a template that does not
                write what it is given, an empty view, or an answer that lies beyond `max_length`.
        """
        place = "a row" if number is None else f"row {number + 1}"
        messages = self._messages(row, place)
        whole, spans = self._whole(messages, place)
        ids, labels, content, cut = self._tokens(whole, spans, place)
        turns = self.turns[::-1] if self.reverse else self.turns
        first, first_cut = self._view(messages, turns[0], self.predictors, place)
        second, second_cut = self._view(messages, turns[1], [], place)
        return {
            "input_ids": ids,
            "labels": labels,
            "content": content,
            "text_input_ids": first.input_ids,
            "text_end": first.end,
            "code_input_ids": second.input_ids,
            "code_end": second.end,
            "truncated": cut or first_cut or second_cut,
        }

    def prompt(self, row: Mapping[str, Any], number: int | None = None) -> tuple[str, str]:
        """What a model is asked, as the template writes it up to the answer, and the right answer.

        Raises:
            UsageError: as for `__call__`.
        """
        place = "a row" if number is None else f"row {number + 1}"
        messages = self._messages(row, place)
        turn = self.turns[1] % len(messages)
        try:
            return self._render(messages[:turn], add_generation_prompt=True), messages[turn]["content"]
        except TemplateError as error:
            raise UsageError(f"the chat template refuses {place}: {' '.join(str(error).split())}") from None

    # ---- the conversation

    def _messages(self, row: Mapping[str, Any], place: str) -> list[Message]:
        if row.get("messages") is not None:
            messages = row["messages"]
            if self.tokenizer.chat_template is None:
                raise UsageError(
                    "the tokenizer has no chat template, which rows of messages need: give --chat_template_path, a "
                    "model that has one, or data with two columns"
                )
            good = isinstance(messages, Sequence) and all(
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
                for message in messages
            )
            if not good or not messages:
                raise UsageError(f"{place} has no messages of the form {{'role': ..., 'content': ...}}")
            for turn in self.turns:
                if not -len(messages) <= turn < len(messages):
                    raise UsageError(f"{place} has {len(messages)} messages, and turn {turn} is to be a view")
                if not messages[turn]["content"].strip():
                    raise UsageError(f"{place} has an empty message {turn}, which is to be a view; leave the row out")
            return [{"role": message["role"], "content": message["content"]} for message in messages]
        for name in self.columns:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UsageError(
                    f"{place} has neither messages nor a text in column {name!r}; name the columns by "
                    f"--text_column_name and --code_column_name, out of: {', '.join(map(str, row))}"
                )
        text, code = (row[name] for name in self.columns)
        return [{"role": "user", "content": text}, {"role": "assistant", "content": code}]

    def _render(self, messages: list[Message], **kwargs: Any) -> str:
        """The conversation as the model reads it."""
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        begin, stop = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""  # no template: text, code
        parts = [begin] if messages else []
        for message in messages:
            parts.append(message["content"] + ("\n" if message["role"] == "user" else stop))
        return "".join(parts)

    def _whole(self, messages: list[Message], place: str) -> tuple[str, list[tuple[int, int, int]]]:
        """The conversation, and in characters where each answer begins, where its content ends and where it ends.

        The first entry is not an answer but the content of the message that is the first view.
        """
        try:
            whole = self._render(messages)
            text = messages[self.turns[0]]["content"].strip()
            begin = max(whole.rfind(text), 0)
            answering, spans = messages[self.turns[1]]["role"], [(begin, begin + len(text), begin + len(text))]
            for index, message in enumerate(messages):
                if message["role"] != answering:
                    continue
                before = self._render(messages[:index], add_generation_prompt=True)
                through = self._render(messages[: index + 1])
                if not whole.startswith(before) or not through.startswith(before):
                    raise UsageError(
                        f"the chat template does not write {place} in the order of its turns, so that its answers "
                        "cannot be told from its prompts; give --chat_template_path, or data with two columns"
                    )
                content = message["content"].strip()
                at = through.find(content, len(before))
                ends = at + len(content) if at >= 0 else len(before)
                spans.append((len(before), ends, len(through)))
        except TemplateError as error:
            raise UsageError(f"the chat template refuses {place}: {' '.join(str(error).split())}") from None
        return whole, spans

    def _tokens(
        self, whole: str, spans: list[tuple[int, int, int]], place: str
    ) -> tuple[list[int], list[int], list[int], bool]:
        """Token ids and labels of the conversation, its first and last token of content, and whether it was cut."""
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        special = special_ids(self.tokenizer)
        text, *spans = spans
        ends = spans[-1][1]
        inside = [index for index, (start, end) in enumerate(offsets) if end > text[0] and start < ends]
        if self.train_on_prompt:
            labels = [IGNORED if token == self.tokenizer.eos_token_id else token for token in ids]
        else:
            labels = [IGNORED] * len(ids)
            for begin, content_ends, stops in spans:
                for index, (token, (start, _)) in enumerate(zip(ids, offsets, strict=True)):
                    if not begin <= start < stops:
                        continue
                    labels[index] = token
                    if start >= content_ends and token in special:
                        break  # the stop token; what the template writes after it is none of the model's business
        cut = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise UsageError(
                f"{place} has no answer within its first {self.max_length} tokens; make max_length (--max_seq_length) "
                "larger, or leave the row out"
            )
        return ids, labels, [inside[0], min(inside[-1], len(ids) - 1)], cut

    # ---- the views

    def _view(self, messages: list[Message], turn: int, predictors: list[str], place: str) -> tuple[View, bool]:
        """A message as the template writes it, within the conversation or by itself, with predictor tokens in it."""
        index = turn % len(messages)
        content = messages[index]["content"].strip()
        tokens = "".join(predictors)
        shown = tokens + content if self.predictor_position == "start" else content + tokens
        written = self._written(messages[:index], {**messages[index], "content": shown}, place)
        at = written.rfind(shown)
        if at < 0:
            raise UsageError(f"the chat template does not write message {turn} of {place} as it is; use other data")
        encoded = self.tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        inside = [number for number, (start, end) in enumerate(offsets) if start < at + len(shown) and end > at]
        begin, end = inside[0], inside[-1]
        excess = len(ids) - self.max_length
        if excess > 0:
            # The end of the content goes; predictor tokens after it, and what the template writes, stay.
            kept = len(predictors) if self.predictor_position == "end" else 0
            last = end - kept
            if last - excess < begin + (0 if self.predictor_position == "end" else len(predictors)):
                raise UsageError(
                    f"{place} has nothing left of message {turn} within {self.max_length} tokens; make max_length "
                    "(--max_seq_length) larger"
                )
            ids = ids[: last - excess + 1] + ids[last + 1 :]
            end -= excess
        return View(ids, end), excess > 0

    def _written(self, before: list[Message], message: Message, place: str) -> str:
        """How the template writes one message: what it adds to the turns before; by itself; or as a user's."""
        begin = self.tokenizer.bos_token
        for earlier, one in ((before, message), ([], message), ([], {**message, "role": "user"})):
            try:
                prefix = self._render(earlier) if earlier else ""
                through = self._render([*earlier, one])
            except TemplateError:
                continue
            if through.startswith(prefix):
                written = through[len(prefix) :]
                starts = begin is not None and through.startswith(begin) and not written.startswith(begin)
                return begin + written if starts else written
        raise UsageError(f"the chat template can write no single message of {place}; give data with two columns")
