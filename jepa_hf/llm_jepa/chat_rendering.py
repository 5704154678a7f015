"""Conversations as text, and the places of their messages in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, one_line
from .conversations import Conversation, Message

# Stands for a message's content to find its place. Characters for private use: no template strips them.
_MARKER = "\ue0f1\ue0f2\ue0f1"


@dataclass(frozen=True)
class Answer:
    """Character offsets of an answer: its start, the end of its content, and the end of its turn."""

    start: int
    content_stop: int
    stop: int


class ChatRenderer:
    """Render conversations with a tokenizer's chat template; two columns also without one.

    A message is located by rendering the conversation once more with a marker as its content. The
    surrounding text is then the template's, whatever the template does with other messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def render(self, conversation: Conversation, stop: int | None = None, add_generation_prompt: bool = False) -> str:
        """Render the messages before index `stop`, by default all; no messages are the empty text."""
        messages = conversation.messages[:stop]
        if self.tokenizer.chat_template is None:
            if conversation.has_messages:
                raise UsageError(
                    "The tokenizer has no chat template, but the rows have messages. Give --chat_template_path, a "
                    "model with a chat template, or data with two columns."
                )
            return self._render_columns(messages)
        if not messages:
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, conversation.tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (TemplateError, TypeError, ValueError) as error:  # a template may expect other types
            raise UsageError(
                f"the chat template rejects {conversation.name}: {one_line(error)}; change or remove the row"
            ) from None

    def _render_columns(self, messages: Sequence[Message]) -> str:
        """Render text, a newline, code, stop token."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        parts = [bos] if messages else []
        for message in messages:
            parts.append(message["content"] + ("\n" if message["role"] == "user" else eos))
        return "".join(parts)

    def locate(self, text: str, conversation: Conversation, index: int) -> tuple[int, int] | None:
        """Return start and end of a message's content in `text`, the rendered conversation; None if it is left out."""
        marked = self.render(_with_content(conversation, index, _MARKER))
        if marked.count(_MARKER) > 1:
            raise UsageError(
                f"the chat template writes message {index} of {conversation.name} several times, so its place is "
                "unclear; give --chat_template_path, or data with two columns"
            )
        before, marker, after = marked.partition(_MARKER)
        if not marker:
            return None
        # Both shrink if the template writes more around this content, such as thoughts that it holds.
        start = _common_length(text, before)
        stop = len(text) - _common_length(text[start:][::-1], after[::-1])
        content = conversation.messages[index]["content"]
        if "".join(text[start:stop].split()) not in "".join(content.split()):
            raise UsageError(
                f"the chat template changes the content of message {index} of {conversation.name}; give "
                "--chat_template_path, or other data"
            )
        return start, stop

    def answers(self, text: str, conversation: Conversation) -> list[Answer]:
        """Locate the answers in `text`, the rendered conversation; those that the template leaves out have no place.

        An answer starts behind the prompt that generation would continue, so that it includes what
        the template writes before its content, such as empty thoughts.
        """
        found = []
        for index, message in enumerate(conversation.messages):
            place = self.locate(text, conversation, index) if message["role"] == "assistant" else None
            if place is None or index < conversation.first_answer:
                continue
            prompt = self.render(conversation, index, add_generation_prompt=True)
            start = len(prompt) if text.startswith(prompt) and index else place[0]
            stop = len(text)
            if index + 1 < len(conversation.messages):
                # The end of a turn is what the template writes after it both at the end and here.
                ending = self.render(_with_content(conversation, index, _MARKER), index + 1).rpartition(_MARKER)[2]
                stop = place[1] + _common_length(text[place[1] :], ending)
            found.append(Answer(min(start, place[0]), place[1], stop))
        return found

    def render_view(self, conversation: Conversation, index: int) -> tuple[str, int, int]:
        """Render one message as the next turn of its conversation, else alone, else alone as the user's.

        Returns:
            The text, and start and end of the content in it, without surrounding whitespace.
        """
        message = {**conversation.messages[index], "content": conversation.messages[index]["content"].strip()}
        history, alone = conversation.messages[:index], {**message, "role": "user"}
        reason: UsageError | None = None
        for messages in ([*history, message], [message], [alone]):
            part = replace(conversation, messages=messages)
            try:
                prefix, text = self.render(part, -1), self.render(part)
                place = self.locate(text, part, len(messages) - 1)
            except UsageError as error:
                reason = reason or error
                continue
            if (
                place is None
                or place[0] < len(prefix)
                or not text.startswith(prefix)
                or not text[slice(*place)].strip()
            ):
                continue
            return self._cut_view(text, len(prefix), place)
        raise reason or UsageError(
            f"the chat template leaves out message {index} of {conversation.name}, which is a view; give "
            "--chat_template_path, or data with two columns"
        )

    def _cut_view(self, text: str, begin: int, place: tuple[int, int]) -> tuple[str, int, int]:
        """Return the text from `begin`, after a BOS token if the conversation has one."""
        bos, view = self.tokenizer.bos_token, text[begin:]
        if bos is not None and text.startswith(bos) and not view.startswith(bos):
            view, begin = bos + view, begin - len(bos)
        content = text[slice(*place)]
        start = place[0] - begin + len(content) - len(content.lstrip())
        return view, start, start + len(content.strip())


def _with_content(conversation: Conversation, index: int, content: str) -> Conversation:
    messages: list[Any] = list(conversation.messages)
    messages[index] = {**messages[index], "content": content}
    return replace(conversation, messages=messages)


def _common_length(first: str, second: str) -> int:
    """Return the length of the longest common start."""
    if first.startswith(second):
        return len(second)
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), len(first))
