"""The notebooks run from top to bottom without a network, and show what they print."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.cli import REPOSITORY
from helpers.scripts import load_script

RUNNER = load_script(REPOSITORY / "docs" / "run_notebooks.py")
NAMES = sorted(path.stem for path in RUNNER.NOTEBOOKS.glob("*.ipynb"))


def load(name: str) -> dict[str, Any]:
    return json.loads((RUNNER.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory with two steps and fewer texts, every cell runs, and the last cell with code prints."""
    monkeypatch.chdir(tmp_path)
    outputs = list(RUNNER.run(load(name), STEPS="2", texts="list(package_of)[::10]"))
    assert outputs[-1]


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_show_their_outputs(name: str) -> None:
    """Cells that print have stored outputs, of one run from top to bottom and without an error."""
    cells = RUNNER.code_cells(load(name))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell["outputs"]) or "print(" not in "".join(cell["source"])
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream"}


def test_outputs_and_replacements(tmp_path: Path) -> None:
    """A cell's output is what it prints; IPython's commands are left out; an assignment can be replaced."""
    cells = [{"cell_type": "code", "source": [line]} for line in ("%pip install x", "N = 3", "print(N)")]
    notebook = {"cells": [*cells, {"cell_type": "markdown", "source": ["text"]}]}
    printed = list(RUNNER.run(notebook, N="5"))
    assert printed == ["", "", "5\n"]
    assert RUNNER.with_outputs(notebook, printed)["cells"][2]["outputs"][0]["text"] == ["5\n"]
