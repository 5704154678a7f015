"""Run the notebooks' code cells in an empty directory and put what they print into the notebooks.

    python docs/run_notebooks.py                 # all of docs/notebooks
    python docs/run_notebooks.py text features   # these

The cells of a notebook share one interpreter. Lines that begin with % (IPython's commands) are left out.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent / "notebooks"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells with code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], **replacements: str) -> Iterator[str]:
    """Run the code cells in the working directory; yield what each prints to stdout.

    Args:
        notebook: the parsed `.ipynb` file.
        replacements: of assignments in the cells; `STEPS="2"` makes "STEPS = 1000" "STEPS = 2".
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in code_cells(notebook):
        lines = [line for line in "".join(cell["source"]).split("\n") if not line.startswith("%")]
        for name, value in replacements.items():
            lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in lines]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n".join(lines), "a cell", "exec"), scope)
        yield printed.getvalue()


def with_outputs(notebook: dict[str, Any], printed: list[str]) -> dict[str, Any]:
    """Set what the code cells printed as their outputs."""
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), start=1):
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": number, "outputs": [output] if text else []}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names without .ipynb; default: all")
    names = parser.parse_args().names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for path in [(NOTEBOOKS / f"{name}.ipynb").resolve() for name in names]:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            printed = list(run(notebook))
        text = json.dumps(with_outputs(notebook, printed), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
