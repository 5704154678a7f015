"""The error of bad input, which an exported model brings along."""


class UsageError(ValueError):
    """Bad input. Its message is one sentence that names the thing and the remedy.

    The command line prints it on stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """
