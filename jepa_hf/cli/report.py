"""`jepa-hf report`: one HTML page about a run."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..report.run_report import EVALUATION_FILE, REPORT_FILE, write_report
from .console import complain, quiet_libraries
from .parsing import CommandParser


def main(argv: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    quiet_libraries()
    parser = CommandParser(
        prog="jepa-hf report",
        description="Write one self-contained HTML page about a run, finished or not: curves with a sentence of "
        "reading each, masks, probes, spectrum, map and neighbours of its own samples, settings and versions.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a run")
    parser.add_argument("--output", metavar="PATH", help=f"the file to write, default RUN_DIR/{REPORT_FILE}")
    parser.add_argument(
        "--max_samples",
        metavar="N",
        type=int,
        default=1000,
        help="samples of the run's data behind spectrum, map and neighbours, at most, default 1000",
    )
    parser.add_argument(
        "--evaluation",
        metavar="PATH",
        help=f"what jepa-hf evaluate wrote, default RUN_DIR/{EVALUATION_FILE} where there is one",
    )
    try:
        options = parser.parse_args(argv)
        verdict = write_report(options.run_dir, options.output, options.max_samples, options.evaluation)
    except UsageError as error:
        return complain("jepa-hf report", error)
    print(f"{verdict.sentence}\nwritten to {options.output or Path(options.run_dir) / REPORT_FILE}")
    return 0
