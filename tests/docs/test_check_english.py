"""The English checker: the clean files pass, and banned constructions are found."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from helpers.cli import REPOSITORY


def load_checker() -> ModuleType:
    """Load .ci/check_english.py, a script outside the package."""
    spec = importlib.util.spec_from_file_location("check_english", REPOSITORY / ".ci" / "check_english.py")
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    return checker


CHECKER = load_checker()


def test_clean_files_are_clean() -> None:
    """No file of the list contains a banned construction."""
    assert [(path, hit) for path in CHECKER.files(CHECKER.CLEAN) for hit in CHECKER.hits(path)] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("the update is left out, and told", []),
        ("a failed update is told here", ["is told"]),
        ("Train on the first so many texts only.", ["so many"]),
        ("mend it or leave the whole row out", ["whole row", "mend"]),
        ("Whether x is None.", []),
        ("The rest is none of it.", ["is none"]),
        ("There is none.", []),
        ("There is no longer a table.", []),
    ],
)
def test_constructions_are_found(line: str, found: list[str], tmp_path: Path) -> None:
    """Each line yields its constructions, outside code blocks."""
    page = tmp_path / "page.md"
    page.write_text(f"```\nis told\n```\n{line}\n", encoding="utf-8")
    assert [(number, text) for number, text, _ in CHECKER.hits(page)] == [(4, text) for text in found]


def test_a_glob_without_a_file_is_an_error() -> None:
    """A renamed file does not drop out of the list silently."""
    with pytest.raises(FileNotFoundError, match=r"docs/missing\.md"):
        CHECKER.files(("docs/missing.md",))
