"""Shared type aliases."""

from typing import Annotated, TypeVar, get_type_hints

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

# Converts raw samples to the model's inputs; feature vectors need none.
ProcessingClass = PreTrainedTokenizerBase | BaseImageProcessor

T = TypeVar("T")
_MAY_CHANGE = "may change on a resume"
# Type of a setting that does not affect the weights, so that a resumed run may have another value.
# Not in the field's `metadata`, all of which `HfArgumentParser` passes on to argparse.
MayChange = Annotated[T, _MAY_CHANGE]


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
