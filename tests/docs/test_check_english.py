"""The English checker: the clean files pass, and banned constructions are found."""

from pathlib import Path

import pytest

from helpers.cli import REPOSITORY
from helpers.scripts import load_script

CHECKER = load_script(REPOSITORY / ".ci" / "check_english.py")


@pytest.mark.slow
def test_clean_files_are_clean() -> None:
    """No file of the list contains a banned construction."""
    assert [(path, hit) for path in CHECKER.files(CHECKER.CLEAN) for hit in CHECKER.hits(path)] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    # english: off
    [
        ("the update is left out, and told", ["told"]),
        ("Train on the first so many texts only.", ["so many"]),
        ("mend it or leave the whole row out", ["whole row", "mend"]),
        ("Whether x is None.", []),
        ("The rest is none of it.", ["is none"]),
        ("There is none.", []),
        ("There is no longer a table.", []),
    ],
    # english: on
)
def test_constructions_are_reported(line: str, expected: list[str], tmp_path: Path) -> None:
    """Each line yields its constructions, outside code blocks."""
    page = tmp_path / "page.md"
    page.write_text(f"```\nso many\n```\n{line}\n", encoding="utf-8")
    assert [(number, text) for number, text, _ in CHECKER.hits(page)] == [(4, text) for text in expected]


def test_a_glob_without_a_file_is_an_error() -> None:
    """A renamed file does not drop out of the list silently."""
    with pytest.raises(FileNotFoundError, match=r"docs/missing\.md"):
        CHECKER.files(("docs/missing.md",))
