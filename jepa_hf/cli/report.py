"""`jepa-hf report`: one HTML page about a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .console import CommandParser, existing_directory, run_command


def main(argv: Sequence[str]) -> int:
    """Write the page about a run; returns the exit code."""
    return run_command("jepa-hf report", _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf report",
        description="Write one self-contained HTML page about a run, finished or not: curves with a sentence about "
        "each, masks, probes, spectrum, map and nearest neighbours of the run's samples, settings and versions.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=existing_directory, help="the output_dir of a run")
    parser.add_argument("--output", metavar="PATH", help="file to write; default RUN_DIR/report.html")
    parser.add_argument(
        "--max_samples",
        metavar="N",
        type=int,
        default=1000,
        help="maximum number of the run's samples for spectrum, map and neighbours; default 1000",
    )
    parser.add_argument(
        "--evaluation",
        metavar="PATH",
        help="results of jepa-hf evaluate; default RUN_DIR/evaluation/evaluation.json if it exists",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    from ..report.run_report import REPORT_FILE, write_report  # imports torch

    verdict = write_report(options.run_dir, options.output, options.max_samples, options.evaluation)
    print("\n".join([*verdict.lines, f"written to {options.output or Path(options.run_dir) / REPORT_FILE}"]))
