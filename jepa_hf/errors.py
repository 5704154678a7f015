"""The exceptions whose message is for the user."""

from .models.errors import UsageError

__all__ = ["RunError", "UsageError"]


class RunError(RuntimeError):
    """A run that cannot go on. Its message is one sentence: what happened, what is kept, and the remedy.

    The command line prints it on stderr and exits with code 1; from Python it is an ordinary `RuntimeError`.
    """
