"""Parsers of command lines and YAML recipes."""

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial, reduce
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..data.arguments import DataArguments
from ..errors import UsageError, one_line
from .arguments import MaskArguments, ModelArguments, RunArguments
from .console import CommandParser
from .dictionary_flags import dictionary_flags, merge_dictionaries
from .help import usage
from .quick_checks import describe_unknown, read_recipe, read_valid_recipe

# A negative number with an exponent.
_NEGATIVE = re.compile(r"-\d*\.?\d+[eE][+-]?\d+")
# Dataclasses whose fields are the flags of an encoder's run.
_CLASSES = (ModelArguments, DataArguments, MaskArguments, RunArguments)


class _Parser(HfArgumentParser):
    """`HfArgumentParser` with one-line errors, whose Boolean flags need no value."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        # argparse lists each flag twice, with underscores and with hyphens.
        raise UsageError(re.sub(r"^argument (--\w+)(/--?[\w-]+)*", r"\1", message))


def complete_help(command: str, classes: Sequence[type] = _CLASSES) -> str:
    """Return the help on all flags, in a group per class."""
    parts = [usage(command)]
    for kind in classes:
        parser = _Parser(kind, prog=command, add_help=False, usage=argparse.SUPPRESS, allow_abbrev=False)
        title = kind.__name__.removesuffix("Arguments").removeprefix("Llm").lower()
        parts.append(f"{title or 'run'}:\n" + parser.format_help().partition("\n")[2].strip("\n"))
    return "\n\n".join(parts)


def parse_command(argv: Sequence[str], classes: Sequence[type] = _CLASSES) -> tuple[Any, ...]:
    """Parse `[CONFIG.yaml] [--flag value ...]`; flags override the file.

    Returns:
        An instance of each class.

    Raises:
        UsageError: an unknown flag or key (the message suggests the nearest valid one), or a value of the wrong type.
    """
    parser = _Parser(classes, allow_abbrev=False)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        # A pretrained model on the command line replaces the random start of a recipe.
        pretrained = any(flag.split("=")[0].replace("-", "_") == "__model_name_or_path" for flag in argv[1:])
        argv = _read_yaml(argv[0], classes, _RANDOM_START if pretrained else ()) + argv[1:]
    argv = _join_negative_numbers(argv)
    argv = _merge_repeated(argv, dictionary_flags(classes))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:  # from TrainingArguments
        raise UsageError(one_line(error)) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UsageError(
                f"{flag!r} follows no flag. Put the config file first, and one value after each flag that takes one."
            )
        raise UsageError(f"Unknown {describe_unknown(flag, _field_names(parser), 'flag', _objective(classes))}")
    return tuple(parsed)


def parse_flags(
    flags: dict[str, Any], classes: Sequence[type] = _CLASSES, config: str | None = None
) -> tuple[Any, ...]:
    """Parse arguments given from Python, as `parse_command` does those of a command line.

    Paths may be `Path` objects, several files a list, and values of dictionary flags dictionaries. They override the
    recipe `config`.
    """
    parser = _Parser(classes)
    valid = _field_names(parser)
    for name in flags:
        if name not in valid:
            raise UsageError(f"Unknown {describe_unknown(name, valid, 'argument', _objective(classes))}")
    flags = {name: _from_python(name, value, classes) for name, value in flags.items()}
    if config is not None:
        left_out = _RANDOM_START if flags.get("model_name_or_path") else ()
        parsed = vars(parser.parse_args(_read_yaml(config, classes, left_out)))
        recipe = {name: parsed[name] for name, value in read_recipe(config).items() if value is not None}
        for name in dictionary_flags(classes):
            if name in flags and name in recipe and name not in left_out:
                flags[name] = merge_dictionaries(name, recipe[name], flags[name])
        flags = {**{name: value for name, value in recipe.items() if name not in left_out}, **flags}
    return tuple(parser.parse_dict(flags))


def _from_python(name: str, value: Any, classes: Sequence[type]) -> Any:
    """Convert a value to the form in which the command line gives it."""
    if name in ("train_file", "validation_file") and not isinstance(value, (str, os.PathLike, list, tuple, type(None))):
        dataset = "train_dataset" if name == "train_file" else "eval_dataset"
        raise UsageError(f"{name} takes paths, not a {type(value).__name__}. Pass a data set as {dataset}=...")
    if isinstance(value, bool) and not _takes(name, classes, bool) and _takes(name, classes, (int, float)):
        raise UsageError(f"{name} takes a number, not {value}. Give the number.")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)) and not _takes(name, classes, list):
        return ",".join(map(str, value))
    if isinstance(value, dict) and name in dictionary_flags(classes):
        return merge_dictionaries(name, None, value)
    return value


def _merge_repeated(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Merge the values of each dictionary flag, of the recipe and of the command line, into one."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, action="append", default=[])
    values, rest = parser.parse_known_args(list(argv))
    for name, given in vars(values).items():
        if given:
            rest.append(f"--{name}={reduce(partial(merge_dictionaries, name), given)}")
    return rest


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """Join a flag and a negative number such as -1e-3, which argparse takes for a flag."""
    joined: list[str] = []
    for argument in argv:
        if _NEGATIVE.fullmatch(argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _objective(classes: Sequence[type]) -> str | None:
    return None if classes is _CLASSES else "llm"


def _field_names(parser: HfArgumentParser) -> list[str]:
    return [item.name for kind in parser.dataclass_types for item in fields(kind) if item.init]


# Keys of a recipe that describe an encoder with random weights.
_RANDOM_START = ("model_type", "config_name", "config_overrides")


def _read_yaml(path: str, classes: Sequence[type], leave_out: Sequence[str] = ()) -> list[str]:
    """Return the file as flags, so that its values are converted and checked like a command line's."""
    argv = []
    for key, value in read_valid_recipe(path, _objective(classes)).items():
        if key in leave_out:
            continue
        if isinstance(value, list):
            if not _takes(key, classes, list):
                raise UsageError(f"Config file {path!r}: {key} takes one value, not the list {value}. Give one.")
            argv += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):  # YAML reads `save_strategy: no` as False
            if _takes(key, classes, (int, float)) and not _takes(key, classes, bool):
                raise UsageError(f"Config file {path!r}: {key} takes a number, not {value}. Give the number.")
            argv.append(f"--{key}={'yes' if value else 'no'}")
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _takes(name: str, classes: Iterable[Any], kinds: type | tuple[type, ...]) -> bool:
    """Return whether a flag's type is, or is a union with, one of some types."""
    hint = next(hints[name] for hints in map(get_type_hints, classes) if name in hints)
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    return any(part in wanted or get_origin(part) in wanted for part in (hint, *get_args(hint)))
