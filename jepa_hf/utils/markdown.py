"""Escaping of untrusted text (file names, settings, labels) in Markdown."""

import re
from collections.abc import Iterable, Sequence

# Inline markup: emphasis, code, links, images, tags, entities, formulas, table cells.
_MARKUP = re.compile(r"[\\`*~|<>\[\]&$@]|(?<![^\W_])_|_(?![^\W_])|!(?=\[)|(?<=\w):(?=//)|(?<=\bwww)\.", re.IGNORECASE)
# Delimiters of quotations and code.
_CODE_DELIMITERS = re.compile(r"[\"\\`]")


def single_line(text: str) -> str:
    r"""Replace line breaks and unprintable characters, and collapse blanks.

    >>> single_line(" two\n lines\u202e ")
    'two lines'
    """
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def escape_markdown(text: str) -> str:
    r"""Escape text for a paragraph, heading, list or table cell.

    >>> print(escape_markdown("smooth_l1 | <b>"), escape_markdown("_x_"))
    smooth_l1 \| \<b\> \_x\_
    """
    return _MARKUP.sub(lambda match: f"\\{match.group()}", single_line(text))


def strip_code_delimiters(text: str) -> str:
    """Remove delimiters from text for a quotation in a code block.

    >>> strip_code_delimiters('a"b')
    'ab'
    """
    return _CODE_DELIMITERS.sub("", single_line(text))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Build a table from cells that are Markdown.

    >>> print(markdown_table(("a", "b"), [("1", "2")]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
