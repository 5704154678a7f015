"""The error for bad input; exported models contain this file."""


class UsageError(ValueError):
    """Bad input. The message names the problem and the remedy.

    The command line prints it on stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """


def one_line(error: object) -> str:
    """Return the message of another library's error in one line."""
    return " ".join(str(error).split())
