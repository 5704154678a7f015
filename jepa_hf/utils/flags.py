"""Fields of dataclasses as flags of the command line."""

from dataclasses import field
from typing import Annotated, Any, TypeVar, get_type_hints

T = TypeVar("T")
_MAY_CHANGE = "may change on a resume"
# Type of a setting that does not affect the weights, so that a resumed run may have another value.
# Not in the field's `metadata`, all of which `HfArgumentParser` passes on to argparse.
MayChange = Annotated[T, _MAY_CHANGE]


def flag(default: Any, text: str) -> Any:
    """Return a field of a dataclass: a flag with its default and its help.

    Classes of the API reference call `field` themselves, because the reference shows the defaults of no other function.
    """
    return field(default=default, metadata={"help": text})


def may_change(kind: type) -> set[str]:
    """Name the fields of a dataclass whose type is `MayChange`.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Settings:
    ...     seed: int
    ...     log_level: MayChange[str]
    >>> may_change(Settings)
    {'log_level'}
    """
    hints = get_type_hints(kind, include_extras=True)
    return {name for name, hint in hints.items() if _MAY_CHANGE in getattr(hint, "__metadata__", ())}
