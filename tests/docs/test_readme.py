"""README: its commands, examples, flags and paths."""

import re
from pathlib import Path

import pytest

from docs.test_docs import RUNNER, known_flags
from helpers.cli import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_two_commands_do_all_the_set_up() -> None:
    """There are exactly two commands, of one line each: install and run, install and test."""
    first, second = blocks("bash")
    assert first == "pip install -e . && python run_jepa.py configs/quickstart.yaml\n"
    assert second == 'pip install -e ".[test]" && pytest\n'


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_python_quickstart_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart trains without data or network and prints the output that README shows."""
    monkeypatch.chdir(tmp_path)
    section = README.split("## Python quickstart")[1].split("\n## ")[0]
    printed = RUNNER.run_page(section, tmp_path)
    shown = [(block.output, message) for block, message in zip(RUNNER.blocks(section), printed, strict=True)]
    assert [
        pair for output, message in shown if output is not None for pair in RUNNER.differences(output, message)
    ] == []


def test_every_flag_exists() -> None:
    """Each `--flag` is one of run_jepa.py or of jepa-hf."""
    assert set(re.findall(r"--[a-z][a-z0-9_]+", README)) - known_flags() == set()


def test_every_file_it_names_exists() -> None:
    """Links and paths into the repository lead to files, and anchors to headings."""
    for path in re.findall(r"(?:configs|benchmarks|docs|tests|\.ci)/[\w./-]+\.(?:yaml|md|png|svg|sh|txt)", README):
        assert (REPOSITORY / path).is_file(), path
    for path in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", README):
        assert (REPOSITORY / path).is_file(), path


def test_code_structure_lists_the_folders() -> None:
    """The table has one line for each folder of the package."""
    listed = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(path.parent.name for path in (REPOSITORY / "jepa_hf").glob("*/__init__.py"))


def test_citation_is_the_packages() -> None:
    """The BibTeX entry has the version of CITATION.cff."""
    version = re.search(r"^version: (.+)$", (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"version = {{{version}}}" in README
