"""`jepa-hf report`: one HTML page about a run."""

import argparse
from pathlib import Path

from ..report.run_report import REPORT_FILE, write_report


def run(options: argparse.Namespace) -> None:
    """Write the page; prints the verdict."""
    verdict = write_report(options.run_dir, options.output, options.max_samples, options.evaluation)
    print("\n".join([*verdict.lines, f"written to {options.output or Path(options.run_dir) / REPORT_FILE}"]))
