"""`jepa-hf push`: a run's result to the Hub."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..hub.push import Destination, PushError, files_to_push, push_run
from .console import complain, quiet_libraries
from .parsing import CommandParser


def main(argv: Sequence[str]) -> int:
    """Push; returns the exit code: 0; 1 where the Hub failed or refused; 2 after bad input."""
    quiet_libraries()
    try:
        options = _parser().parse_args(argv)
        return _run(options)
    except UsageError as error:
        return complain("jepa-hf push", error)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf push",
        description="Push what a run left to the Hub, in one commit: at the repository's root the plain encoder, under "
        "jepa/ the full model to train on from, beside them tokenizer, card, metrics.json and pictures. Checkpoints, "
        "settings, masks.png and report.html are left out: the last three show paths and samples of the data.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a run, or what jepa-hf export wrote")
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub; it is made where there is none")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch, made where there is none")
    parser.add_argument("--tag", metavar="NAME", help="then tag the new state, such as v1.0")
    parser.add_argument("--token", help="default: that of HF_TOKEN, or of `hf auth login`, which no process list shows")
    parser.add_argument("--commit_message", metavar="TEXT", default="Push of a jepa_hf run", help="of the commit")
    return parser


def _run(options: argparse.Namespace) -> int:
    """Check, push, print; returns the exit code."""
    to = Destination(options.repo, options.private or None, options.revision, options.token)
    if not Path(options.run_dir).is_dir():
        raise UsageError(f"RUN_DIR {options.run_dir!r} is no directory; give the output_dir of a run")
    if not options.commit_message.strip():
        raise UsageError("commit_message is empty; say what is pushed, or leave it out")
    count = len(files_to_push(options.run_dir))
    try:
        commit = push_run(options.run_dir, to, options.commit_message, options.tag, sys.stderr.isatty())
    except PushError as error:
        tag = f" --tag {shlex.quote(options.tag)}" if options.tag else ""
        again = f"{error}; nothing here is lost, and this repeats it: {to.command(options.run_dir)}{tag}"
        complain("jepa-hf push", PushError(again))
        return 1
    print(f"pushed {count} files to {commit.repo_url.repo_id}: {commit.commit_url}")
    return 0
