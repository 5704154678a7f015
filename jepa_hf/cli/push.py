"""`jepa-hf push`: upload of a run's result to the Hub."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from ..errors import UsageError
from ..utils.counts import counted
from .console import CommandParser, existing_directory, report_error, run_command


def main(argv: Sequence[str]) -> int:
    """Push a run; returns the exit code: 0, 1 if the Hub failed or refused, 2 after bad input."""
    return run_command("jepa-hf push", _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf push",
        description="Push the result of a run to the Hub, in one commit: the plain encoder at the repository's root, "
        "the full model under jepa/, and tokenizer, card, metrics.json and pictures. Checkpoints, settings, masks.png "
        "and report.html stay here: the last three show paths and samples of the data.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=existing_directory, help="output_dir of a run or of jepa-hf export"
    )
    parser.add_argument("repo", metavar="REPO", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch; created if it does not exist")
    parser.add_argument("--tag", metavar="NAME", help="tag the new commit, for example v1.0")
    parser.add_argument("--token", help="default: HF_TOKEN or that of `hf auth login`, which no process list shows")
    parser.add_argument(
        "--commit_message", metavar="TEXT", default="Push of a jepa_hf run", help="message of the commit"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    """Check the options and push; returns the exit code."""
    from ..hub.push import HubTarget, PushError, files_to_push, push_run  # imports torch

    to = HubTarget(options.repo, options.private or None, options.revision, options.token)
    if not options.commit_message.strip():
        raise UsageError("commit_message is empty. Describe the push, or omit the option.")
    count = len(files_to_push(options.run_dir))
    try:
        commit = push_run(options.run_dir, to, options.commit_message, options.tag, sys.stderr.isatty())
    except PushError as error:
        tag = f" --tag {shlex.quote(options.tag)}" if options.tag else ""
        repeat = f"{to.command(options.run_dir)}{tag}"
        message = f"{str(error).rstrip('.')}. The local files are unchanged. This command repeats the push: {repeat}"
        report_error("jepa-hf push", PushError(message))
        return 1
    print(f"pushed {counted(count, 'file')} to {commit.repo_url.repo_id}: {commit.commit_url}")
    return 0
