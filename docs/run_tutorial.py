"""Run the tutorial from top to bottom in an empty directory, and compare its outputs with those on the page.

    python docs/run_tutorial.py            # compare
    python docs/run_tutorial.py --write    # put this run's outputs into the page

Python blocks share one interpreter, bash blocks run in shells of their own. A `text` block right after one of them
shows what it printed. A block with a comment `<!-- not run: the reason -->` before it is left out.
"""

import argparse
import contextlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "tutorial.md"

_BLOCK = re.compile(
    r"^(?P<left_out><!-- not run: [^\n]+ -->\n+)?"
    r"```(?P<language>python|bash)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
_SHARE = re.compile(r"(?<![\d.,])\d+ %")  # a percentage without decimals


@dataclass(frozen=True)
class Block:
    """A block of code that is to be run.

    Args:
        language: "python" or "bash".
        code: what to run.
        output: what the page shows of what it prints; None where it shows nothing.
        span: where `output` lies in the page.
    """

    language: str
    code: str
    output: str | None
    span: tuple[int, int]


def blocks(page: str) -> list[Block]:
    """The blocks of a page that are to be run, in order."""
    found = (match for match in _BLOCK.finditer(page) if not match["left_out"])
    return [Block(match["language"], match["code"], match["output"], match.span("output")) for match in found]


def run(block: Block, scope: dict[str, Any], folder: Path) -> str:
    """What a block prints to stdout, without spaces at the ends of lines.

    Args:
        scope: the names of all Python blocks so far.
        folder: where bash blocks run; Python blocks run where this process does.

    Raises:
        CalledProcessError: a command of a bash block failed.
    """
    if block.language == "python":
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block.code, "a block of the page", "exec"), scope)
        printed = said.getvalue()
    else:
        printed = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            cwd=folder,
            env=_environment(folder),
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        ).stdout
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


def _environment(folder: Path) -> dict[str, str]:
    """The page's commands are those of this interpreter and this package, installed or not."""
    commands = folder / ".commands"
    commands.mkdir(exist_ok=True)
    for name, module in (("jepa-hf", " -m jepa_hf.cli"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    repository = str(Path(__file__).resolve().parents[1])
    paths = filter(None, [repository, os.environ.get("PYTHONPATH")])
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def differences(shown: str, printed: str) -> Iterator[tuple[str, str]]:
    """Pairs of lines, of the page and of this run, that do not say the same.

    Words have to be equal. Fractions may be off by a quarter or by 0.1 (with one decimal: by 25), percentages
    by 5, whole numbers above 1,000 by a twentieth; other whole numbers have to be equal.

    >>> list(differences("rank 80.1 of 96", "rank 85.5 of 96"))
    []
    >>> list(differences("rank 80.1 of 96", "rank 80.1 of 64"))
    [('rank 80.1 of 96', 'rank 80.1 of 64')]
    """
    ours, theirs = shown.splitlines(), printed.splitlines()
    lines = max(len(ours), len(theirs))
    for one, other in zip(_padded(ours, lines), _padded(theirs, lines), strict=True):
        if not _same(one, other):
            yield one, other


def _padded(lines: list[str], length: int) -> list[str]:
    return lines + [""] * (length - len(lines))


def _same(one: str, other: str) -> bool:
    words = [" ".join(_NUMBER.sub("#", line).split()) for line in (one, other)]
    shares = [_NUMBER.findall(" ".join(_SHARE.findall(line))) for line in (one, other)]
    if words[0] != words[1] or not all(abs(float(a) - float(b)) <= 5 for a, b in zip(*shares, strict=True)):
        return False
    others = [_NUMBER.findall(_SHARE.sub("", line)) for line in (one, other)]
    return all(map(_close, *others))


def _close(one: str, other: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (one, other))
    if "." in one:
        decimals = len(one.partition(".")[2])
        return math.isclose(a, b, rel_tol=0.25, abs_tol=25 if decimals == 1 else 0.1)
    return math.isclose(a, b, rel_tol=0.05 if abs(a) > 1000 else 0)


def run_page(page: str, folder: Path) -> list[str]:
    """What each block of a page prints. The process has to be in `folder`, which is empty."""
    scope: dict[str, Any] = {}
    return [run(block, scope, folder) for block in blocks(page)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the outputs into the page")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        printed = run_page(page, Path(folder))
    shown = [(block, said) for block, said in zip(blocks(page), printed, strict=True) if block.output is not None]
    if options.write:
        for block, said in reversed(shown):
            page = page[: block.span[0]] + said + page[block.span[1] :]
        PAGE.write_text(page, encoding="utf-8")
        return 0
    wrong = [pair for block, said in shown for pair in differences(block.output, said)]
    for one, other in wrong:
        print(f"the page: {one}\nthis run: {other}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
