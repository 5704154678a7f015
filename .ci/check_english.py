"""Count constructions that the project's style bans; fail where a clean file contains one.

python .ci/check_english.py            # files of CLEAN: every hit, exit code 1 if there is one
python .ci/check_english.py --all      # all prose and Python files too: counts per construction, exit code as above
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Globs of files that must not contain any of the constructions. Add a file here once it is rewritten.
CLEAN = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
    ".github/**/*.md",
    ".ci/check_english.py",
    "docs/**/*.md",
    "jepa_hf/**/*.py",
    "run_jepa.py",
)
ALL = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "jepa_hf/**/*.py", "tests/**/*.py", "docs/*.py", "*.py")

# Construction and the usual remedy.  # english: off
BANNED = {
    r"\b(?:is|are|was|were|be|been) told\b|\btold again\b": "log, print, raise, reimplemented",
    r"\btells?\b(?! .* apart)": "name the verb: shows, logs, raises",
    r"\bwhat (?:the|a|an|it|they|each|every|others?) [\w-]+ \w+s\b(?=[.,;:]|$)": "name the noun",
    r"\bwho may\b|\bwhat of\b": "name the noun",
    r"\bso many\b": "a number, N",
    r"\bever after\b|\bas ever\b": "from then on",
    r"\bwhole (?:file|row|line|path|batch|checkpoint|text|image|sample|run|suite)s?\b": "complete, full, entire",
    r"\bbesides?\b": "next to, with, in addition to",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bslant\b": "bias",
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="count in all prose and Python files too")
    options = parser.parse_args()
    count = 0
    for path in files(CLEAN):
        for number, text, remedy in hits(path):
            print(f"{path.relative_to(ROOT)}:{number}: '{text}': {remedy}")
            count += 1
    if options.all:
        by_text: Counter[str] = Counter()
        by_file: Counter[str] = Counter()
        for path in files(ALL):
            for _, text, _ in hits(path):
                by_text[text.lower()] += 1
                by_file[str(path.relative_to(ROOT))] += 1
        for title, counter in (("construction", by_text), ("file", by_file)):
            print(f"\n{sum(counter.values())} hits by {title}:")
            print("\n".join(f"{number:5d}  {name}" for name, number in counter.most_common(20)))
    print(f"{count} banned constructions in {len(files(CLEAN))} clean files")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
