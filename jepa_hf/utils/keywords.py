"""Suggestions for misspelt keyword arguments."""

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import Any, Self

from ..errors import UsageError

# More valid names than these are not listed in a message.
_MAX_LISTED = 30


class ChecksKeywords:
    """Base of classes that refuse an unknown keyword argument with its owner, or the name of the nearest one.

    Subclasses may set `_owner_of`, which returns the classes that take an argument, or None.

    Raises:
        UsageError: On construction with an unknown keyword argument.
    """

    @staticmethod
    def _owner_of(name: str) -> str | None:
        return None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the names before `__init__` runs."""
        valid = keyword_names([vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)])
        check_names(cls.__name__, kwargs, valid, cls._owner_of)
        return super().__new__(cls)


def keyword_names(functions: Collection[Callable[..., Any]]) -> list[str]:
    """List the parameters of functions that pass their `**kwargs` on to the next one.

    >>> def first(a, **kwargs): ...
    >>> def second(b, *, c=1): ...
    >>> def never_reached(d): ...
    >>> keyword_names([first, second, never_reached])
    ['a', 'b', 'c']
    """
    names: list[str] = []
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        names += [item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        if not any(item.kind == item.VAR_KEYWORD for item in parameters):
            break
    return [name for name in names if name != "self"]


def check_names(
    owner: str, names: Collection[str], valid: Collection[str], owner_of: Callable[[str], str | None]
) -> None:
    """Refuse names that are not valid.

    Raises:
        UsageError: There is one; the message names the class that takes it, or the nearest valid name.
    """
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
            if place := owner_of(name):
                hint = f"Pass it to {place}."
            elif close:
                hint = f"Did you mean {close[0]}?"
            elif len(valid) <= _MAX_LISTED:
                hint = f"It takes {', '.join(valid)}."
            else:
                hint = "Omit it."
            raise UsageError(f"{owner} has no argument {name!r}. {hint}")
