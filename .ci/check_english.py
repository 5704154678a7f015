"""Report constructions that the project's style bans; exit with 1 if there is one.

python .ci/check_english.py
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Globs of files that must not contain any of the constructions.
CLEAN = (
    "*.md",
    "*.py",
    ".ci/*.py",
    ".github/**/*.md",
    "benchmarks/**/*.md",
    "benchmarks/**/*.py",
    "docs/**/*.md",
    "docs/**/*.ipynb",
    "docs/*.py",
    "jepa_hf/**/*.py",
    "tests/**/*.py",
)

# Construction and the usual remedy.  # english: off
BANNED = {
    r"\btold\b": "log, print, raise, reimplemented",
    r"\btells?\b(?! .* apart)": "name the verb: shows, logs, raises",
    r"\bwhat (?:the|a|an|it|they|each|every|others?) [\w-]+ \w+s\b(?=[.,;:]|$)": "name the noun",
    r"\bwho may\b|\bwhat of\b": "name the noun",
    r"\bso many\b": "a number, N",
    r"\bever after\b|\bas ever\b": "from then on",
    r"\bwhole (?:file|row|line|path|batch|checkpoint|text|image|sample|run|suite)s?\b": "complete, full, entire",
    r"\bbesides?\b": "next to, with, in addition to",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bslant\b": "bias",
    r"\bhit rates?\b": "top-1 accuracy",
    r"\brivals?\b": "baseline",
    r"\bgave up\b": "stopped",
    r"(?<!there )\b(?:is|are) (?:no|(?-i:none))\b(?! longer)": "is not a, lacks",
    r"\bnor may\b": "and must not",
    r"\ba word to\b|\bspoke\b|\bspeaks? of\b": "mention, warn",
    r"\bwhere there is (?:one|none|no)\b": "if one exists",
    r"\bhas its place\b|\bbelongings\b": "plain words",
}  # english: on


def hits(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, matched text and remedy of each banned construction in a file, outside code blocks."""
    active = True
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if "# english: o" in line or line.startswith("```"):
            active = not active
            continue
        if active:
            for pattern, remedy in BANNED.items():
                for match in re.finditer(pattern, line, re.IGNORECASE):
                    yield number, match[0], remedy


def files(globs: tuple[str, ...]) -> list[Path]:
    """Return the existing files of some globs, sorted; a glob without a file is an error."""
    for glob in globs:
        if not any(ROOT.glob(glob)):
            raise FileNotFoundError(f"No file matches {glob}. Remove it from {Path(__file__).name}.")
    return sorted({path for glob in globs for path in ROOT.glob(glob)})


def main() -> int:
    found = [(path.relative_to(ROOT), *hit) for path in files(CLEAN) for hit in hits(path)]
    for path, number, text, remedy in found:
        print(f"{path}:{number}: '{text}': {remedy}")
    print(f"{len(found)} banned constructions in {len(files(CLEAN))} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
