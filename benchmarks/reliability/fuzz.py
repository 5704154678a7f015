"""The properties of tests/test_fuzz.py on many more cases: `python benchmarks/reliability/fuzz.py 100000 --seed 0`.

The cases are divided evenly among the properties. A case that fails is counted and the run goes on; each kind of
failure is printed once, with the case that showed it. Prints the table of RESULTS 13.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from hypothesis import seed

os.environ["JEPA_HF_FUZZ_CASES"] = "1000"  # of one seed: Hypothesis remembers all of a run
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests")]
import test_fuzz  # noqa: E402


def main() -> int:
    """Run; returns 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int, nargs="?", default=100_000, help="all properties together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="properties whose names hold one of these")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # warnings of damaged images
    datasets.disable_progress_bars()

    properties = {
        name: test
        for name, test in vars(test_fuzz).items()
        if name.startswith("test_") and any(part in name for part in options.only)
    }
    rows: list[tuple[str, int, int, int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        for name, test in properties.items():
            cases = -(-options.cases // len(properties))
            refused, failures, took = run(test, cases, options.seed)
            rows.append((name.removeprefix("test_").replace("_", " "), cases, refused, sum(failures.values()), took))
            print(f"{rows[-1]}", file=sys.stderr, flush=True)
            for place, count in failures.most_common():
                print(f"  {count} x {place}", file=sys.stderr, flush=True)
        tempfile.tempdir = None
    numbers = list(zip(*(row[1:] for row in rows), strict=True))
    rows.append(("**all**", *map(sum, numbers)))
    print("| property | cases | refused with a sentence | failures | seconds |\n| --- | --- | --- | --- | --- |")
    for name, cases, refused, failed, took in rows:
        print(f"| {name} | {cases:,} | {refused:,} | {failed} | {took:.0f} |")
    return int(rows[-1][3] > 0)


def run(test: Callable[..., None], cases: int, first_seed: int) -> tuple[int, Counter[str], float]:
    """How many of a property's cases were refused, its failures by where they came from, and the seconds it took."""
    inner, attempt = test.hypothesis.inner_test, test_fuzz.call_or_usage_error
    tried, refused, failures = 0, 0, Counter()

    def noting(call: Callable[[], Any]) -> Any:
        nonlocal refused
        results = attempt(call)
        refused += results is None
        return results

    def counting(*drawn: Any, **named: Any) -> None:
        nonlocal tried
        if tried == cases:
            return
        tried += 1
        try:
            inner(*drawn, **named)
        except Exception as error:
            failures[place(error)] += 1
            if failures[place(error)] == 1:
                print(f"{place(error)}\n  {drawn or named!r:.1500}", file=sys.stderr, flush=True)

    test.hypothesis.inner_test, test_fuzz.call_or_usage_error = counting, noting
    start = time.perf_counter()
    number = first_seed
    while tried < cases:
        seed(number)(test)()
        number += 1
    test.hypothesis.inner_test, test_fuzz.call_or_usage_error = inner, attempt
    return refused, failures, time.perf_counter() - start


def place(error: Exception) -> str:
    """The type of an error, and the last line of this package in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "jepa_hf" in frame.filename or frame.filename.endswith("test_fuzz.py")]
    output = re.sub("[0-9]+", "#", str(error))
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {output:.60}"


if __name__ == "__main__":
    sys.exit(main())
