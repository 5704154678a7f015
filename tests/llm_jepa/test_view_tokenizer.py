"""Labels cover answers and their stop tokens; views end where their content ends."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.llm import CHATML, conversations, tokenizer
from jepa_hf import UsageError
from jepa_hf.llm_jepa import PairedViewTokenizer
from jepa_hf.llm_jepa.predictor_tokens import predictor_tokens
from jepa_hf.llm_jepa.view_tokenizer import IGNORE_INDEX

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


def view_tokenizer(template: str | None = CHATML, predictors: int = 1, **kwargs: Any) -> PairedViewTokenizer:
    words = tokenizer(template, bos_token="[CLS]")
    words.add_tokens(predictor_tokens(predictors), special_tokens=True)
    return PairedViewTokenizer(words, num_predictor_tokens=predictors, **kwargs)


def text(views: PairedViewTokenizer, ids: list[int]) -> str:
    """Decode ids, without the spaces between tokens."""
    return views.tokenizer.decode([number for number in ids if number >= 0]).replace(" ", "")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_labels_are_the_answer_and_its_stop_token(template: str) -> None:
    """Only the answer and its stop token have labels."""
    views = view_tokenizer(template)
    for row in conversations(5):
        pair = views(row)
        answer = row["messages"][-1]["content"]
        assert text(views, pair["labels"]) == answer.replace(" ", "") + "<|im_end|>"
        assert all(
            label in (IGNORE_INDEX, token) for label, token in zip(pair["labels"], pair["input_ids"], strict=True)
        )


# Templates whose rendering of a message depends on other messages, or whose answers end otherwise.
_LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
_NEXT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_THOUGHTS = "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
_SAID = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
UNUSUAL = {
    "empty thoughts": _LOOP + _THOUGHTS + "{{ m['content'] }}<|im_end|>\n" + _NEXT,
    "no earlier thoughts": _LOOP
    + "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n"
    + _NEXT,
    "always a prompt": CHATML + "{% if not add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no stop": _LOOP + "{{ m['content'] }}\n" + _NEXT,
    "a stop in ordinary text": _LOOP + "{{ m['content'] }} </s>\n" + _NEXT,
    "a stop at the end": _LOOP + "{{ m['content'] }}\n{% if loop.last %}<|im_end|>{% endif %}" + _NEXT,
    "merged": "{% for m in messages %}{% if loop.first or loop.previtem['role'] != m['role'] %}"
    "<|im_start|>{{ m['role'] }}\n{% endif %}{{ m['content'] }}"
    "{% if loop.last or loop.nextitem['role'] != m['role'] %}<|im_end|>{% endif %}\n" + _NEXT,
    "last turns only": "{% set messages = messages[-3:] %}" + CHATML,
    "generation": _LOOP + _SAID + "\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}" + _NEXT,
    "generation of contents": _LOOP
    + _SAID.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    + "\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    + _NEXT,
    "generation with header": "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "<|im_start|>assistant\n{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}" + _NEXT,
    "generation of the last answer": _LOOP
    + "{% if loop.last and m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    + _NEXT,
}
ENDS = {"no stop": "", "a stop in ordinary text": "</s>", "a stop at the end": ""}


@pytest.mark.parametrize("begins", [False, True], ids=["", "the assistant begins"])
@pytest.mark.parametrize("template", UNUSUAL)
def test_labels_of_several_answers(template: str, begins: bool) -> None:
    """Labels are on the answers that the template writes and on what ends them, whatever it does with other turns."""
    turns = [("user", "class"), ("assistant", "module name"), ("user", "return value"), ("assistant", "object list")]
    turns = [*([("assistant", "import")] if begins else []), *turns, ("user", "thanks")]
    views = view_tokenizer(UNUSUAL[template], 0)
    found = views({"messages": [{"role": role, "content": content} for role, content in turns]})
    end = ENDS.get(template, "<|im_end|>")
    expected = "".join(content.replace(" ", "") + end for role, content in turns if role == "assistant")
    if template == "empty thoughts":
        expected = expected.replace("object", "<think></think>object")
    elif template == "generation of the last answer":
        expected = "objectlist<|im_end|>"
    elif template == "last turns only":
        expected = "modulename<|im_end|>objectlist<|im_end|>"
    elif template == "a stop at the end":
        expected += "<|im_end|>"
    assert text(views, found["labels"]) == expected
    assert "thanks" not in text(views, found["input_ids"])
    assert found["labels"].count(IGNORE_INDEX) > 5


def test_labels_of_thoughts_in_a_content() -> None:
    """A template that leaves out earlier thoughts leaves them unlabelled; the last answer's are learned."""
    turns = [("user", "class"), ("assistant", "<think>name</think>module"), ("user", "value")]
    turns.append(("assistant", "<think>object</think>list"))
    views = view_tokenizer(UNUSUAL["no earlier thoughts"], 1)
    found = views({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert text(views, found["labels"]) == "module<|im_end|><think>object</think>list<|im_end|>"
    assert "<think>object</think>list" in text(views, found["code_input_ids"])


def test_consecutive_answers_of_one_turn() -> None:
    """Answers that a template merges have labels, and one stop token."""
    views = view_tokenizer(UNUSUAL["merged"], 0)
    turns = [("user", "class"), ("assistant", "module"), ("assistant", "name")]
    found = views({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert text(views, found["labels"]) == "modulename<|im_end|>"


def test_tool_calls_are_learned() -> None:
    """A call without content is an answer, its result is not; tools reach the template."""
    template = (
        "{% if tools %}<|im_start|>system\n{{ tools[0]['name'] }}<|im_end|>\n{% endif %}"
        + _LOOP
        + "{{ m['content'] }}{% for call in m.tool_calls %}call {{ call['name'] }}{% endfor %}<|im_end|>\n"
        + _NEXT
    )
    views = view_tokenizer(template, 1)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "list"}]}
    turns = [("user", "class"), ("tool", "value"), ("assistant", "name")]
    question, result, answer = ({"role": role, "content": content, "tool_calls": None} for role, content in turns)
    found = views({"messages": [question, call, result, answer], "tools": [{"name": "import"}]})
    assert text(views, found["labels"]) == "calllist<|im_end|>name<|im_end|>"
    assert text(views, found["input_ids"]).startswith("<|im_start|>systemimport<|im_end|>")


def test_prompt_and_completion() -> None:
    """TRL's rows: two texts, or two lists of messages, of which the completion alone is learned."""
    views = view_tokenizer()
    expected = views({"text": "class name", "code": "return value"})
    assert views({"prompt": "class name", "completion": "return value"}) == expected
    prompt, completion = ({"role": "user", "content": "class name"}, {"role": "assistant", "content": "return value"})
    assert views({"prompt": [prompt], "completion": [completion]}) == expected
    longer = views({"prompt": [prompt, completion, prompt], "completion": [completion]})
    assert text(views, longer["labels"]) == "returnvalue<|im_end|>"
    assert views.prompt({"prompt": [prompt], "completion": [completion]})[1] == "return value"


def test_named_columns_replace_messages() -> None:
    """A named column replaces messages and other pairs of columns; the error lists all columns."""
    row = {**conversations(1)[0], "ask": "class name", "code": "return value"}
    views = view_tokenizer(text_column="ask")
    assert text(views, views(row)["labels"]) == "returnvalue<|im_end|>"
    with pytest.raises(UsageError, match=r"'question'; name the columns .* out of: messages, ask, code"):
        view_tokenizer(text_column="question")(row)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (CHATML.replace("m['content'].strip()", "m['content'] | upper"), "changes the content of message 1 of row 4"),
        (CHATML.replace("m['content'].strip()", "m['content'] * 2"), "writes message 1 of row 4 several times"),
        (CHATML + "{{ raise_exception('no') }}", "the chat template rejects row 4: no; change or remove the row"),
        (CHATML + "{{ messages[0] + 1 }}", "the chat template rejects row 4"),
        ("{% generation %}{% endgeneration %}" + CHATML, "marks no answer of row 4"),
    ],
)
def test_templates_that_hide_the_answers_are_refused(template: str, sentence: str) -> None:
    """The error names the row and the reason."""
    with pytest.raises(UsageError, match=sentence):
        view_tokenizer(template)({"text": "class", "code": "name"}, 3)


@pytest.mark.parametrize("predictors", [0, 1, 3])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_view_ends_at_its_last_content_token(template: str, predictors: int) -> None:
    """With predictor tokens, the end is the last of them; they count down to 1."""
    views = view_tokenizer(template, predictors)
    for row in conversations(5):
        pair = views(row)
        words = {m["role"]: m["content"] for m in row["messages"]}
        token = views.tokenizer.convert_ids_to_tokens(pair["text_input_ids"])[pair["text_end"]]
        last = views.tokenizer.tokenize(words["user"])[-1]
        assert token == ("<|predictor_1|>" if predictors else last)
        assert text(views, pair["text_input_ids"]).count("<|predictor_") == predictors
        ending = views.tokenizer.convert_ids_to_tokens(pair["code_input_ids"])[pair["code_end"]]
        assert ending == views.tokenizer.tokenize(words["assistant"])[-1]
        assert words["user"].replace(" ", "") in text(views, pair["text_input_ids"])
        assert words["assistant"].replace(" ", "") in text(views, pair["code_input_ids"])
        assert words["user"].replace(" ", "") not in text(views, pair["code_input_ids"])


def test_view_is_rendered_as_in_its_conversation() -> None:
    """A view has no default system prompt if the conversation has its own."""
    views = view_tokenizer(DEFAULT_SYSTEM, 0)
    pair = views(conversations(1)[0])
    assert "youarealist" not in text(views, pair["text_input_ids"])
    assert text(views, pair["code_input_ids"]).startswith("<|im_start|>assistant")


def test_views_start_with_the_bos_token() -> None:
    """A template's first token starts each view."""
    views = view_tokenizer(LLAMA3)
    pair = views(conversations(1)[0])
    for name in ("input_ids", "text_input_ids", "code_input_ids"):
        assert pair[name][0] == views.tokenizer.bos_token_id
        assert pair[name].count(views.tokenizer.bos_token_id) == 1


def test_long_conversations() -> None:
    """Every answer has labels, and any turns can be the views."""
    turns = [("user", "class"), ("assistant", "module name"), ("user", "return value"), ("assistant", "object list")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    pair = view_tokenizer()(row)
    assert text(view_tokenizer(), pair["labels"]) == "modulename<|im_end|>objectlist<|im_end|>"
    views = view_tokenizer(text_turn=1, code_turn=3)
    pair = views(row)
    assert "modulename<|predictor_1|>" in text(views, pair["text_input_ids"])
    assert "objectlist" in text(views, pair["code_input_ids"])


def test_reverse() -> None:
    """With `reverse`, the answer predicts the question."""
    row = conversations(1)[0]
    views = view_tokenizer(predictors=2, reverse=True)
    pair = views(row)
    answer, question = (row["messages"][turn]["content"].replace(" ", "") for turn in (-1, -2))
    assert answer + "<|predictor_2|><|predictor_1|>" in text(views, pair["text_input_ids"])
    assert question in text(views, pair["code_input_ids"])


def test_predictor_tokens_before_the_content() -> None:
    """They precede the content in the order of the official code, which puts one after the other in front."""
    row = conversations(1)[0]
    views = view_tokenizer(predictors=2, predictor_position="start")
    pair = views(row)
    question = row["messages"][-2]["content"]
    assert "<|predictor_1|><|predictor_2|>" + question.replace(" ", "") in text(views, pair["text_input_ids"])
    last = views.tokenizer.convert_ids_to_tokens(pair["text_input_ids"])[pair["text_end"]]
    assert last == views.tokenizer.tokenize(question)[-1]


def test_official_labels() -> None:
    """`train_on_prompt` labels all tokens except stop tokens."""
    views = view_tokenizer(train_on_prompt=True)
    pair = views(conversations(1)[0])
    stop = views.tokenizer.eos_token_id
    assert pair["labels"] == [IGNORE_INDEX if token == stop else token for token in pair["input_ids"]]


def test_columns_without_template() -> None:
    """Without a template a row is text, newline, code, stop token."""
    views = view_tokenizer(None, 1)
    pair = views({"text": "class name", "code": "return value"})
    assert text(views, pair["input_ids"]) == "[CLS]classnamereturnvalue<|im_end|>"
    assert text(views, pair["labels"]) == "returnvalue<|im_end|>"
    assert text(views, pair["text_input_ids"]) == "[CLS]classname<|predictor_1|>"


def attempt(views: PairedViewTokenizer, row: dict[str, Any]) -> dict[str, Any] | str:
    """Return the row, or the error message."""
    try:
        return views(row)
    except UsageError as error:
        return str(error)


@given(length=st.integers(1, 60), longest=st.integers(12, 50), predictors=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_truncation_cuts_the_content(length: int, longest: int, predictors: int) -> None:
    """Predictor tokens and the template's text after them are kept."""
    views, untruncated = (
        view_tokenizer(predictors=predictors, max_length=longest),
        view_tokenizer(predictors=predictors, max_length=512),
    )
    row = {
        "messages": [
            {"role": "user", "content": " ".join(["class"] * length)},
            {"role": "assistant", "content": "name"},
        ]
    }
    expected = untruncated(row)
    too_long = len(expected["text_input_ids"]) > longest
    pair = attempt(views, row)
    if isinstance(pair, str):
        assert "within" in pair
        assert len(expected["input_ids"]) > longest
        return
    assert pair["truncated"] == (too_long or len(expected["input_ids"]) > longest)
    assert len(pair["text_input_ids"]) == min(longest, len(expected["text_input_ids"]))
    if predictors:
        names = views.tokenizer.convert_ids_to_tokens(pair["text_input_ids"])
        assert [name for name in names if name.startswith("<|predictor")] == predictor_tokens(predictors)
        assert names[pair["text_end"]] == "<|predictor_1|>"
    assert pair["text_input_ids"][-1] == expected["text_input_ids"][-1]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [{"role": "assistant", "content": "class"}]}, "row 4 has 1 message, so turn -2 cannot"),
        ({"messages": [{"role": "user", "content": "class"}]}, "row 4 has no answer: its messages have the roles user"),
        ({"messages": [{"role": "user", "content": None}] * 2}, "row 4 has no messages of the form"),
        ("class", "row 4 is a str, not a dictionary of columns"),
        ({}, "out of: none (the row has no columns)"),
        ({"prompt": "class"}, "row 4 has neither messages nor a column 'completion'"),
        ({"prompt": "class", "completion": " "}, "row 4 has a blank text in column 'completion'"),
        ({"prompt": "class", "completion": None}, "row 4 has no value in column 'completion'"),
        ({"text": 4, "code": "class"}, "row 4 has int 4 in column 'text', where a text is expected"),
        (
            dict.fromkeys(("text", "code", "prompt", "completion"), "class"),
            "row 4 has the columns text/code and prompt/completion; name those to learn from",
        ),
        ({"messages": [{"role": "user"}] * 2}, "row 4 has no messages of the form"),
        ({"messages": "class"}, "row 4 has no messages of the form"),
        (
            {"question": "class"},
            "row 4 has neither messages nor a column 'text'; name the columns .* out of: question",
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
def test_unusable_rows_are_named(row: dict[str, Any], sentence: str) -> None:
    """The error names the row and the problem."""
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        view_tokenizer(max_length=128)(row, 3)


def test_another_column_called_text_does_not_hide_the_prompt() -> None:
    """As data sets for TRL have it: the pair whose columns are both there is read."""
    row = {"text": "class name class", "prompt": "class", "completion": "name"}
    assert view_tokenizer().prompt(row, 0)[1].strip() == "name"


def test_messages_need_a_chat_template() -> None:
    """Messages without a chat template are a usage error."""
    with pytest.raises(UsageError, match="no chat template"):
        view_tokenizer(None)(conversations(1)[0])


def test_template_that_drops_content_is_refused() -> None:
    """A view's content must be in the rendered text."""
    dropping = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(UsageError, match="leaves out message -2 of a row"):
        view_tokenizer(dropping)(conversations(1)[0])


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"predictors": 11}, "between 0 and 10"),
        ({"predictor_position": "middle"}, "end or start"),
        ({"predictors": 3, "max_length": 4}, "no room for text"),
    ],
)
def test_invalid_settings_are_refused(settings_: dict[str, Any], sentence: str) -> None:
    """Each invalid setting is a usage error."""
    with pytest.raises(UsageError, match=sentence):
        view_tokenizer(**settings_)


def test_missing_predictor_tokens_are_refused() -> None:
    """The tokenizer must contain the predictor tokens."""
    with pytest.raises(UsageError, match="call add_predictor_tokens first"):
        PairedViewTokenizer(tokenizer(), num_predictor_tokens=1)


def test_prompt_ends_where_the_answer_begins() -> None:
    """The prompt ends with the generation prompt and does not contain the answer."""
    row = conversations(1)[0]
    prompt, right = view_tokenizer().prompt(row)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert right == row["messages"][-1]["content"]
    assert right not in prompt
