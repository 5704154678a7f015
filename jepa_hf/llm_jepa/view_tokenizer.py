"""Tokenization of conversations: token ids, answer labels, and two views."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.argument_owners import owner_of_argument
from ..utils.counts import counted
from ..utils.keywords import ChecksKeywords
from .chat_rendering import Answer, ChatRenderer
from .conversations import Conversation, read_conversation
from .predictor_tokens import predictor_tokens

IGNORE_INDEX = -100
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class OverlongRowError(UsageError):
    """A row of which nothing to learn is left within the maximum length."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all special tokens: named ones, such as `eos_token`, and added ones.

    Ordinary text can contain the unknown token, which counts only if it also ends texts (GPT-2).
    """
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added} - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})


class View(NamedTuple):
    """Token ids of a view, the index of the token whose state represents it, and whether it was truncated."""

    input_ids: list[int]
    end_index: int
    truncated: bool


def check_view_settings(num_predictor_tokens: int, predictor_position: str, max_length: int | None) -> None:
    """Raise a `UsageError` for settings out of range; `max_length` None stands for a default."""
    predictor_tokens(num_predictor_tokens)
    if predictor_position not in ("end", "start"):
        raise UsageError(f"predictor_position must be end or start, got {predictor_position!r}.")
    if max_length is not None and max_length < num_predictor_tokens + 2:
        raise UsageError(
            f"max_length (--max_seq_length) {max_length} leaves no room for text with {num_predictor_tokens} "
            "predictor tokens. Increase it."
        )


class PairedViewTokenizer(ChecksKeywords):
    """Tokenize chat messages or two columns into rows for `DataCollatorForPairedViews`.

    Each view is one message of the conversation, rendered by the chat template (LLM-JEPA, section 3.1: Text and Code).
    The predictor tokens follow or precede the content of the predicting view. Labels are on what the assistant says and
    on its stop token. If the template marks that by `{% generation %}`, labels are within the marks.

    Args:
        tokenizer: a fast tokenizer. With `num_predictor_tokens` above 0 it must contain `predictor_tokens`, see
            `add_predictor_tokens`. Without a chat template, only columns are supported: text, a newline, code.
        max_length: maximum number of tokens of a row and of a view. A longer row is truncated at
            its end, a longer view at the end of its content.
        text_turn: index of the message that is the first view; negative values count from the last answer.
        code_turn: index of the message that is the second view.
        text_column: column of the first view; default see `read_conversation`.
        code_column: column of the second view.
        num_predictor_tokens: k, 0 to 10; with 0 the state of the content's last token is the prediction.
        predictor_position: "end" or "start" of the predicting view's content.
        reverse: whether the second view predicts the first.
        train_on_prompt: whether all tokens except stop tokens have labels, as in the official code.
            Otherwise only answers have, including their stop token.
        filter_overlong_rows: whether `tokenize_rows` leaves out rows that are longer than
            `max_length`, instead of truncating or refusing them.

    Raises:
        UsageError: a slow tokenizer, missing predictor tokens, or an argument out of range.
    """

    _owner_of = staticmethod(partial(owner_of_argument, llm=True))

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        text_turn: int = -2,
        code_turn: int = -1,
        text_column: str | None = None,
        code_column: str | None = None,
        num_predictor_tokens: int = 1,
        predictor_position: str = "end",
        reverse: bool = False,
        train_on_prompt: bool = False,
        filter_overlong_rows: bool = False,
    ):
        if not tokenizer.is_fast:
            raise UsageError(
                f"Paired views need a fast tokenizer, got {type(tokenizer).__name__}. Load the fast version."
            )
        self.predictors = predictor_tokens(num_predictor_tokens)
        check_view_settings(num_predictor_tokens, predictor_position, max_length)
        missing = [token for token in self.predictors if token not in tokenizer.get_added_vocab()]
        if missing:
            raise UsageError(f"The tokenizer does not contain {missing[0]}: call add_predictor_tokens first.")
        self.tokenizer = tokenizer
        self.renderer = ChatRenderer(tokenizer)
        self._special_ids = special_ids(tokenizer)
        self.max_length = max_length
        self.turns = (text_turn, code_turn)
        self.columns = (text_column, code_column)
        self.predictor_position = predictor_position
        self.reverse = reverse
        self.train_on_prompt = train_on_prompt
        self.filter_overlong_rows = filter_overlong_rows

    def __call__(self, row: Any, number: int | None = None) -> dict[str, Any]:
        """Tokenize one row.

        Args:
            row: a dictionary, see `read_conversation`.
            number: 0-based number of the row, for error messages.

        Returns:
            `input_ids` and `labels`; `stp_span`, the positions of the first token of the first view's message and of
            the last token of an answer's content; `text_input_ids` and `text_end` of the predicting view;
            `code_input_ids` and `code_end` of the predicted one; `truncated`, whether a part was truncated.

        Raises:
            UsageError: a row without the messages or columns, no chat template for messages, a
                template that changes or omits content, or an empty view.
            OverlongRowError: nothing of an answer or of a view is left within `max_length`.
        """
        conversation = self._read(row, number)
        ids, labels, span, truncated = self._tokens(conversation)
        first, second = self.turns[::-1] if self.reverse else self.turns
        predicting, predicted = self._view(conversation, first, self.predictors), self._view(conversation, second, [])
        return {
            "input_ids": ids,
            "labels": labels,
            "stp_span": span,
            "text_input_ids": predicting.input_ids,
            "text_end": predicting.end_index,
            "code_input_ids": predicted.input_ids,
            "code_end": predicted.end_index,
            "truncated": truncated or predicting.truncated or predicted.truncated,
        }

    def is_overlong(self, row: Any, number: int | None = None) -> bool:
        """Return whether a part of a row exceeds `max_length`."""
        try:
            return self(row, number)["truncated"]
        except OverlongRowError:
            return True

    def prompt(self, row: Any, number: int | None = None) -> tuple[str, str]:
        """Return the rendered prompt, up to where the answer begins, and the reference answer."""
        conversation = self._read(row, number)
        turn = self.turns[1] % len(conversation.messages)
        message = conversation.messages[turn]
        if message["role"] != "assistant":
            raise UsageError(
                f"{conversation.name} has a message of the role {message['role']} at turn {self.turns[1]}, not an "
                "answer to generate; change --code_turn"
            )
        return self.renderer.render(conversation, turn, add_generation_prompt=True), message["content"]

    def _read(self, row: Any, number: int | None) -> Conversation:
        """Return the conversation of a row, whose views exist and are not empty."""
        conversation = read_conversation(row, number, *self.columns)
        messages = conversation.messages
        for turn in self.turns:
            if not -len(messages) <= turn < len(messages):
                raise UsageError(
                    f"{conversation.name} has {counted(len(messages), 'message')}, so turn {turn} cannot be a view; "
                    "change --text_turn or --code_turn, or remove the row"
                )
            if not messages[turn]["content"].strip():
                raise UsageError(
                    f"{conversation.name} has an empty message {turn}, which cannot be a view; remove the row"
                )
        return conversation

    def _tokens(self, conversation: Conversation) -> tuple[list[int], list[int], list[int], bool]:
        """Return ids, labels, first and last content position, and whether the row is truncated."""
        text = self.renderer.render(conversation)
        answers = self.renderer.answers(text, conversation)
        first = self.renderer.locate(text, conversation, self.turns[0] % len(conversation.messages))
        if first is None or not answers:
            raise UsageError(
                f"the chat template leaves out {'the answers' if first else f'message {self.turns[0]}'} of "
                f"{conversation.name}; give --chat_template_path, or data with two columns"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if self.train_on_prompt:
            labels = [IGNORE_INDEX if token == self.tokenizer.eos_token_id else token for token in ids]
        else:
            labels = self._answer_labels(text, ids, offsets, answers, self._generation_mask(conversation))
        content = text[slice(*first)]
        start, stop = first[0] + len(content) - len(content.lstrip()), answers[-1].content_stop
        inside = _tokens_between(offsets, start, stop)
        truncated = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        # The first token is never predicted, so that it has no label.
        if all(target == IGNORE_INDEX for target in labels[1:]):
            if not truncated:
                raise UsageError(
                    f"the chat template marks no answer of {conversation.name} by {{% generation %}}; give "
                    "--chat_template_path, or remove the row"
                )
            raise OverlongRowError(
                f"{conversation.name} has no answer within its first {self.max_length} tokens; increase max_length "
                "(--max_seq_length), remove the row, or leave out all such rows with --filter_overlong_rows"
            )
        return ids, labels, [inside[0], min(inside[-1], len(ids) - 1)], truncated

    def _generation_mask(self, conversation: Conversation) -> list[int] | None:
        """Return transformers' mask of the tokens in `{% generation %}` blocks; None without such blocks."""
        if not _GENERATION_BLOCK.search(self.tokenizer.chat_template or ""):
            return None
        encoded: Any = self.tokenizer.apply_chat_template(
            conversation.messages, conversation.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["assistant_masks"]

    def _answer_labels(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        answers: Iterable[Answer],
        generation_mask: Sequence[int] | None,
    ) -> list[int]:
        """Label the tokens of each answer, and those up to the first special token behind it."""
        labels = [IGNORE_INDEX] * len(ids)
        mask = generation_mask or [1] * len(ids)
        for answer in answers:
            inside = _tokens_between(offsets, answer.start, answer.stop)
            if not any(mask[index] for index in inside):
                continue
            content = [index for index in inside if offsets[index][0] < answer.content_stop]
            ending = [index for index in inside[len(content) :] if offsets[index][1] <= answer.stop]
            stops = [position for position, index in enumerate(ending) if ids[index] in self._special_ids]
            if stops:  # template text after the end-of-turn token is not a target
                ending = ending[: stops[0] + 1]
            else:  # the turn ends with ordinary text, or with nothing
                stop = answer.content_stop + len(text[answer.content_stop : answer.stop].rstrip())
                ending = [index for index in ending if offsets[index][0] < stop]
            for index in [*(index for index in content if mask[index]), *ending]:
                labels[index] = ids[index]
        return labels

    def _view(self, conversation: Conversation, turn: int, predictors: list[str]) -> View:
        """Tokenize one message with the predictor tokens, truncated to `max_length`."""
        text, start, stop = self.renderer.render_view(conversation, turn % len(conversation.messages))
        at_end = self.predictor_position == "end"
        # The official code puts them before a view one by one, which reverses their order.
        tokens = "".join(predictors if at_end else predictors[::-1])
        place = stop if at_end else start
        text, stop = text[:place] + tokens + text[place:], stop + len(tokens)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        inside = _tokens_between(offsets, start, stop)
        begin, end = inside[0], inside[-1]
        excess = len(ids) - self.max_length
        if excess > 0:
            # Cut the end of the content; keep the predictor tokens and the text that the template adds.
            last = end - (len(predictors) if at_end else 0)
            if last - excess < begin + (0 if at_end else len(predictors)):
                raise OverlongRowError(
                    f"{conversation.name} has nothing left of message {turn} within {self.max_length} tokens; "
                    "increase max_length (--max_seq_length), remove the row, or leave out all such rows with "
                    "--filter_overlong_rows"
                )
            ids = ids[: last - excess + 1] + ids[last + 1 :]
            end -= excess
        return View(ids, end, excess > 0)


def _tokens_between(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> list[int]:
    """Return the indices of the tokens with a character from `start` to `stop`."""
    return [index for index, (begin, end) in enumerate(offsets) if end > start and begin < stop]
