"""Rows out of conversations: labels on answers and their stop tokens, and views that end where their content ends."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.llm import CHATML, conversations, tokenizer
from jepa_hf import UsageError
from jepa_hf.llm_jepa import PairedViewTokenizer
from jepa_hf.llm_jepa.view_tokenizer import IGNORED, predictor_tokens

# Other ways to write a conversation that models have.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a list.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# A lone answer is refused, and the system prompt becomes part of the user's turn.
USER_FIRST = (
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% if rest and rest[0]['role'] != 'user' %}{{ raise_exception('a user must speak first') }}{% endif %}"
    "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.first and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "default system": DEFAULT_SYSTEM, "user first": USER_FIRST}


def made(template: str | None = CHATML, predictors: int = 1, **kwargs: Any) -> PairedViewTokenizer:
    words = tokenizer(template, bos_token="[CLS]")
    words.add_tokens(predictor_tokens(predictors), special_tokens=True)
    return PairedViewTokenizer(words, num_predictor_tokens=predictors, **kwargs)


def text(views: PairedViewTokenizer, ids: list[int]) -> str:
    """What ids say, without the blanks that decoding puts around tokens."""
    return views.tokenizer.decode([number for number in ids if number >= 0]).replace(" ", "")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_labels_are_the_answer_and_its_stop_token(template: str) -> None:
    views = made(template)
    for row in conversations(5):
        found = views(row)
        answer = row["messages"][-1]["content"]
        assert text(views, found["labels"]) == answer.replace(" ", "") + "<|im_end|>"
        assert all(label in (IGNORED, token) for label, token in zip(found["labels"], found["input_ids"], strict=True))


@pytest.mark.parametrize("predictors", [0, 1, 3])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_view_ends_at_its_contents_last_token(template: str, predictors: int) -> None:
    """With predictor tokens at the last of these, which counts down to 1."""
    views = made(template, predictors)
    for row in conversations(5):
        found = views(row)
        words = {m["role"]: m["content"] for m in row["messages"]}
        token = views.tokenizer.convert_ids_to_tokens(found["text_input_ids"])[found["text_end"]]
        last = views.tokenizer.tokenize(words["user"])[-1]
        assert token == ("<|predictor_1|>" if predictors else last)
        assert text(views, found["text_input_ids"]).count("<|predictor_") == predictors
        ending = views.tokenizer.convert_ids_to_tokens(found["code_input_ids"])[found["code_end"]]
        assert ending == views.tokenizer.tokenize(words["assistant"])[-1]
        assert words["user"].replace(" ", "") in text(views, found["text_input_ids"])
        assert words["assistant"].replace(" ", "") in text(views, found["code_input_ids"])
        assert words["user"].replace(" ", "") not in text(views, found["code_input_ids"])


def test_a_view_is_written_as_in_its_conversation() -> None:
    """Without the default system prompt that a template puts before a lone turn, where a system prompt is given."""
    views = made(DEFAULT_SYSTEM, 0)
    found = views(conversations(1)[0])
    assert "youarealist" not in text(views, found["text_input_ids"])
    assert text(views, found["code_input_ids"]).startswith("<|im_start|>assistant")


def test_a_template_that_begins_with_a_token_begins_each_view_with_it() -> None:
    views = made(LLAMA3)
    found = views(conversations(1)[0])
    for name in ("input_ids", "text_input_ids", "code_input_ids"):
        assert found[name][0] == views.tokenizer.bos_token_id
        assert found[name].count(views.tokenizer.bos_token_id) == 1


def test_every_answer_of_a_long_conversation_is_learnt_and_any_turns_are_views() -> None:
    turns = [("user", "class"), ("assistant", "module name"), ("user", "return value"), ("assistant", "object list")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = made()(row)
    assert text(made(), found["labels"]) == "modulename<|im_end|>objectlist<|im_end|>"
    views = made(text_turn=1, code_turn=3)
    found = views(row)
    assert "modulename<|predictor_1|>" in text(views, found["text_input_ids"])
    assert "objectlist" in text(views, found["code_input_ids"])


def test_reversed_the_answer_predicts_the_question() -> None:
    row = conversations(1)[0]
    views = made(predictors=2, reverse=True)
    found = views(row)
    answer, question = (row["messages"][turn]["content"].replace(" ", "") for turn in (-1, -2))
    assert answer + "<|predictor_2|><|predictor_1|>" in text(views, found["text_input_ids"])
    assert question in text(views, found["code_input_ids"])


def test_predictor_tokens_may_stand_before_the_content() -> None:
    row = conversations(1)[0]
    views = made(predictors=2, predictor_position="start")
    found = views(row)
    question = row["messages"][-2]["content"]
    assert "<|predictor_2|><|predictor_1|>" + question.replace(" ", "") in text(views, found["text_input_ids"])
    last = views.tokenizer.convert_ids_to_tokens(found["text_input_ids"])[found["text_end"]]
    assert last == views.tokenizer.tokenize(question)[-1]


def test_the_official_labels_are_all_but_stop_tokens() -> None:
    views = made(train_on_prompt=True)
    found = views(conversations(1)[0])
    stop = views.tokenizer.eos_token_id
    assert found["labels"] == [IGNORED if token == stop else token for token in found["input_ids"]]


def test_columns_without_a_template_are_text_newline_code_stop() -> None:
    views = made(None, 1)
    found = views({"text": "class name", "code": "return value"})
    assert text(views, found["input_ids"]) == "[CLS]classnamereturnvalue<|im_end|>"
    assert text(views, found["labels"]) == "returnvalue<|im_end|>"
    assert text(views, found["text_input_ids"]) == "[CLS]classname<|predictor_1|>"


def attempt(views: PairedViewTokenizer, row: dict[str, Any]) -> dict[str, Any] | str:
    """The row, or why there is none."""
    try:
        return views(row)
    except UsageError as error:
        return str(error)


@given(length=st.integers(1, 60), longest=st.integers(12, 50), predictors=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_is_too_long_loses_the_end_of_its_content(length: int, longest: int, predictors: int) -> None:
    """And nothing else: predictor tokens, and what the template writes after them, stay."""
    views, whole = made(predictors=predictors, max_length=longest), made(predictors=predictors, max_length=512)
    row = {
        "messages": [
            {"role": "user", "content": " ".join(["class"] * length)},
            {"role": "assistant", "content": "name"},
        ]
    }
    expected = whole(row)
    too_long = len(expected["text_input_ids"]) > longest
    found = attempt(views, row)
    if isinstance(found, str):
        assert "within" in found
        assert len(expected["input_ids"]) > longest
        return
    assert found["truncated"] == (too_long or len(expected["input_ids"]) > longest)
    assert len(found["text_input_ids"]) == min(longest, len(expected["text_input_ids"]))
    if predictors:
        names = views.tokenizer.convert_ids_to_tokens(found["text_input_ids"])
        assert [name for name in names if name.startswith("<|predictor")] == predictor_tokens(predictors)
        assert names[found["text_end"]] == "<|predictor_1|>"
    assert found["text_input_ids"][-1] == expected["text_input_ids"][-1]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [{"role": "user", "content": "class"}]}, "row 4 has 1 messages, and turn -2 is to be a view"),
        ({"messages": [{"role": "user"}] * 2}, "row 4 has no messages of the form"),
        ({"messages": "class"}, "row 4 has no messages of the form"),
        (
            {"question": "class"},
            "row 4 has neither messages nor a text in column 'text'; name the columns .* out of: question",
        ),
        (
            {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "name"}]},
            "row 4 has an empty message -2",
        ),
        (
            {"messages": [{"role": "user", "content": "class " * 200}, {"role": "assistant", "content": "name"}]},
            "row 4 has no answer within its first 128 tokens",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
        made(max_length=128)(row, 3)


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        made(None)(conversations(1)[0])


def test_a_template_that_drops_content_is_refused() -> None:
    dropping = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(UsageError, match="does not write message"):
        made(dropping)(conversations(1)[0])


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"predictors": 11}, "between 0 and 10"),
        ({"predictor_position": "middle"}, "end or start"),
        ({"predictors": 3, "max_length": 4}, "no room for text"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        made(**settings_)


def test_unknown_predictor_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="call add_predictor_tokens first"):
        PairedViewTokenizer(tokenizer(), num_predictor_tokens=1)


def test_a_prompt_ends_where_the_answer_begins() -> None:
    row = conversations(1)[0]
    prompt, right = made().prompt(row)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert right == row["messages"][-1]["content"]
    assert right not in prompt
