"""`jepa-hf push`: upload of a run's result to the Hub."""

import argparse
import shlex
import sys

from ..errors import UsageError
from ..hub.push import HubTarget, PushError, files_to_push, push_run
from ..utils.counts import counted
from .console import report_error


def run(options: argparse.Namespace) -> int:
    """Check the options and push; returns the exit code."""
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
