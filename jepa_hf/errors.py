"""The exceptions whose message is for the user."""


class UsageError(ValueError):
    """Bad input. Its message is one sentence that names the thing and the remedy.

    The command line prints it on stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class RunError(RuntimeError):
    """A run that cannot go on. Its message is one sentence: what happened, what is kept, and the remedy.

    The command line prints it on stderr and exits with code 1; from Python it is an ordinary `RuntimeError`.
    """
