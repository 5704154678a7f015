"""The one exception for what the user can mend."""


class UsageError(ValueError):
    """Bad input. Its message is one sentence that names the thing and the remedy.

    The command line prints it on stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """
