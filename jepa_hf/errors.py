"""Exceptions with a message for the user."""

from .models.errors import UsageError, one_line

__all__ = ["RunError", "UsageError", "one_line"]


class RunError(RuntimeError):
    """A run cannot continue. The message names the cause, what was saved, and the remedy.

    The command line prints it on stderr and exits with code 1; from Python it is an ordinary `RuntimeError`.
    """
