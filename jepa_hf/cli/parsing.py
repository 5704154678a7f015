"""Parsers of command lines and YAML recipes."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..data.arguments import DataArguments
from ..errors import UsageError
from .arguments import MaskArguments, ModelArguments, RunArguments

# Dataclasses whose fields are the flags of an encoder's run.
_CLASSES = (ModelArguments, DataArguments, MaskArguments, RunArguments)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a `UsageError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the message without argparse's prefix."""
        raise UsageError(message.removeprefix("argument "))


def validate_output_dir(output_dir: str) -> Path:
    """Check that results can be written to a directory, without creating it.

    Raises:
        UsageError: a part of the path is a file, or its first existing parent is not writable.
    """
    folder = Path(output_dir)
    paths = (folder, *folder.parents)
    if any(path.exists() and not path.is_dir() for path in paths):
        raise UsageError(f"output_dir {output_dir!r} is a file, or is under a file; name a directory")
    if not os.access(next(path for path in paths if path.exists()), os.W_OK):
        raise UsageError(f"output_dir {output_dir!r} is not writable; name another directory")
    return folder


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


def peek_objective(argv: Sequence[str]) -> str | None:
    """Return the objective that a command line or its recipe names; it decides which flags exist.

    >>> peek_objective(["--objective", "llm", "--seed", "1"]), peek_objective(["--seed", "1"])
    ('llm', None)

    Raises:
        UsageError: the recipe cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--objective", nargs="?")
    objective = parser.parse_known_args(list(argv))[0].objective
    if objective is None and argv and not argv[0].startswith("-"):
        objective = _yaml_content(argv[0]).get("objective")
    return objective


def parse_command(
    argv: Sequence[str],
    classes: Sequence[type] = _CLASSES,
    description: str = "Pretrain an encoder with JEPA.",
) -> tuple[Any, ...]:
    """Parse `[CONFIG.yaml] [--flag value ...]`; flags override the file.

    Args:
        argv: the command line without the program's name.
        classes: dataclasses whose fields are the flags; default those of an encoder's run.
        description: first line of --help.

    Returns:
        An instance of each class.

    Raises:
        UsageError: an unknown flag or key (the message suggests the nearest valid one), or a value of the wrong type.
    """
    parser = _Parser(classes, prog="run_jepa.py", description=description, allow_abbrev=False)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        # A pretrained model on the command line replaces the random start of a recipe.
        pretrained = any(flag.split("=")[0].replace("-", "_") == "__model_name_or_path" for flag in argv[1:])
        argv = _read_yaml(argv[0], parser, _RANDOM_START if pretrained else ()) + argv[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:  # from TrainingArguments
        raise UsageError(" ".join(str(error).split())) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UsageError(f"{flag!r} follows no flag; a config file comes first, and a flag takes one value")
        raise UsageError(f"unknown {_unknown(flag, [f'--{name}' for name in _field_names(parser)], 'flag')}")
    return tuple(parsed)


def parse_flags(flags: dict[str, Any], classes: Sequence[type] = _CLASSES) -> tuple[Any, ...]:
    """Parse arguments given from Python, as `parse_command` does those of a command line.

    Raises:
        UsageError: an unknown name.
    """
    parser = _Parser(classes)
    valid = _field_names(parser)
    for name in flags:
        if name not in valid:
            raise UsageError(f"unknown {_unknown(name, valid, 'argument')}")
    return tuple(parser.parse_dict(flags))


def _field_names(parser: HfArgumentParser) -> list[str]:
    return [item.name for kind in parser.dataclass_types for item in fields(kind) if item.init]


def _unknown(name: str, valid: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_") if what != "flag" else name, valid, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists the valid ones"
    return f"{what} {name}{hint}"


# Keys of a recipe that describe an encoder with random weights.
_RANDOM_START = ("model_type", "config_name", "config_overrides")


def _yaml_content(path: str) -> dict[Any, Any]:
    if not Path(path).is_file():
        raise UsageError(f"config file {path!r} does not exist")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"config file {path!r} must hold lines of the form `key: value`")
    return content


def _read_yaml(path: str, parser: HfArgumentParser, leave_out: Sequence[str] = ()) -> list[str]:
    """Return the file as flags, so that its values are converted and checked like a command line's."""
    content = _yaml_content(path)
    valid = _field_names(parser)
    for key in content:
        if key not in valid:
            raise UsageError(f"config file {path!r} has the unknown {_unknown(str(key), valid, 'key')}")
    argv = []
    for key, value in content.items():
        if key in leave_out:
            continue
        if isinstance(value, list):
            if not _takes_list(key, list(parser.dataclass_types)):
                raise UsageError(f"config file {path!r}: {key} takes one value, not the list {value}")
            argv += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):  # YAML reads `save_strategy: no` as False
            argv.append(f"--{key}={'yes' if value else 'no'}")
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _takes_list(name: str, classes: Sequence[Any]) -> bool:
    hint = next(hints[name] for hints in map(get_type_hints, classes) if name in hints)
    return any(part is list or get_origin(part) is list for part in (hint, *get_args(hint)))
