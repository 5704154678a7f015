"""Claims about unknown text in Markdown: whatever it is, a reader sees it as text and nothing else."""

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from jepa_hf.utils.markdown import escape_markdown, markdown_table, single_line, strip_code_delimiters

# As the Hub reads: tags, tables, struck-out text.
READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NASTY = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(list("\\`*_~|<>[]()&$@!#-:. \n\r\t\x0b\u2028\u202e\ud800\"'{}%")),
        st.sampled_from(["](x)", "![", "<b>", "&lt;", "<!--", "-->", "**a**", "__a__", "---", "```", "https://x.y"]),
    ),
    max_size=12,
).map("".join)


def inline_kinds(tokens: list[Token]) -> set[str]:
    """What a text consists of, for a reader."""
    return {child.type for token in tokens for child in token.children or ()}


@given(NASTY)
@example("a\\|b")
@example("x_y *z*")
@example("\\")
def test_escaped_text_is_only_text(text: str) -> None:
    """In a paragraph, after a word; the reader sees the very characters."""
    tokens = READER.parse(f"Text {escape_markdown(text)}")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert inline_kinds(tokens) <= {"text", "text_special"}
    seen = "".join(child.content for child in tokens[1].children)
    assert seen == f"Text {single_line(text)}".rstrip()


@given(NASTY, NASTY)
def test_escaped_text_stays_in_its_cell(name: str, value: str) -> None:
    content = markdown_table(("setting", "value"), [(escape_markdown(name), escape_markdown(value)), ("last", "row")])
    tokens = READER.parse(f"{content}\n")
    assert [token.type for token in tokens].count("td_open") == 4
    assert tokens[-1].type == "table_close"
    assert inline_kinds(tokens) <= {"text", "text_special"}


@given(NASTY)
def test_a_quotation_in_code_stays_closed(text: str) -> None:
    line = f'name = "{strip_code_delimiters(text)}"'
    assert compile(line, "card", "exec") is not None
    (token,) = READER.parse(f"```python\n{line}\n```\n")
    assert (token.type, token.content) == ("fence", f"{line}\n")


@given(NASTY)
def test_one_line_can_be_written(text: str) -> None:
    assert single_line(text).encode().decode().splitlines() in ([], [single_line(text)])


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("smooth_l1, targets: mean of the top 4 layers", "me/my-model_2.0", "data (1).csv", "1 x CPU, 50 %"):
        assert escape_markdown(name) == strip_code_delimiters(name) == name
