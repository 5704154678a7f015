"""Checks of the directory that a command writes to; they create nothing."""

import os
from pathlib import Path

from ..errors import UsageError


def check_output_dir(output_dir: str | Path) -> Path:
    """Check that files can be written to a directory, which need not exist.

    Raises:
        UsageError: A part of the path is a file, or its first existing part is not writable.
    """
    folder = Path(output_dir)
    paths = (folder.absolute(), *folder.absolute().parents)
    if any(path.exists() and not path.is_dir() for path in paths):
        raise UsageError(f"output_dir {str(folder)!r} is a file, or lies under one. Name a directory.")
    existing = next(path for path in paths if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"output_dir {str(folder)!r} cannot be written to ({existing} is read-only). Choose another directory."
        )
    return folder


def check_results_dir(output_dir: str, results_file: str, overwrite: bool) -> Path:
    """Check that a command can write its results to a directory, and would not replace earlier ones.

    These are recognized by the name of `results_file`, and `overwrite` (`--overwrite_output_dir`) allows it.

    Raises:
        UsageError: As `check_output_dir`, or it holds results that may not be overwritten.
    """
    folder = check_output_dir(output_dir)
    if (folder / results_file).exists() and not overwrite:
        raise UsageError(
            f"output_dir {output_dir!r} holds the results of an earlier command ({results_file}). Name another "
            "directory, or replace them with --overwrite_output_dir."
        )
    return folder
