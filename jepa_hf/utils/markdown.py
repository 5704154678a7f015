"""Text of unknown origin inside Markdown: names of files, settings, labels. None of it may become markup."""

import re
from collections.abc import Iterable, Sequence

# What begins or ends markup inside a line: emphasis, code, links, images, tags, entities, formulas, table cells.
_MARKUP = re.compile(r"[\\`*~|<>\[\]&$@]|(?<![^\W_])_|_(?![^\W_])|!(?=\[)|(?<=\w):(?=//)|(?<=\bwww)\.", re.IGNORECASE)
# What ends a quotation or a block of code.
_ENDS_CODE = re.compile(r"[\"\\`]")


def one_line(text: str) -> str:
    """The text without line breaks, runs of blanks, and characters that cannot be seen or written.

    >>> one_line(" two\\n lines\\u202e ")
    'two lines'
    """
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def escaped(text: str) -> str:
    """The text as it is to be read, in a paragraph, a heading, a list or a cell of a table.

    >>> print(escaped("smooth_l1 | <b>"), escaped("_x_"))
    smooth_l1 \\| \\<b\\> \\_x\\_
    """
    return _MARKUP.sub(lambda found: f"\\{found.group()}", one_line(text))


def in_code(text: str) -> str:
    """The text for a quotation in a block of code, without what would end either.

    >>> in_code('a"b')
    'ab'
    """
    return _ENDS_CODE.sub("", one_line(text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already.

    >>> print(table(("a", "b"), [("1", "2")]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
