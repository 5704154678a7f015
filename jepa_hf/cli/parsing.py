"""From a command line, or a YAML recipe, to arguments."""

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

# Whose fields the flags of an encoder's run are.
_CLASSES = (ModelArguments, DataArguments, MaskArguments, RunArguments)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` of a command beside `train`, whose error is one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def output_folder(output_dir: str) -> Path:
    """A directory that results can be written to; it is not made here.

    Raises:
        UsageError: it cannot be one.
    """
    folder = Path(output_dir)
    places = (folder, *folder.parents)
    if any(place.exists() and not place.is_dir() for place in places):
        raise UsageError(f"output_dir {output_dir!r} is a file, or lies under one; name a directory")
    if not os.access(next(place for place in places if place.exists()), os.W_OK):
        raise UsageError(f"output_dir {output_dir!r} cannot be written to; name another directory")
    return folder


class _Parser(HfArgumentParser):
    """A parser whose error is one sentence, not two hundred flags and a sentence; every yes-or-no flag stands alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        # Each flag also goes by its name with hyphens: once is enough.
        raise UsageError(re.sub(r"^argument (--\w+)(/--?[\w-]+)*", r"\1", message))


def objective_of(argv: Sequence[str]) -> str | None:
    """The objective that a command, or the recipe that it begins with, names: it decides which flags there are.

    >>> objective_of(["--objective", "llm", "--seed", "1"]), objective_of(["--seed", "1"])
    ('llm', None)

    Raises:
        UsageError: a recipe that cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--objective", nargs="?")
    found = parser.parse_known_args(list(argv))[0].objective
    if found is None and argv and not argv[0].startswith("-"):
        found = _yaml_content(argv[0]).get("objective")
    return found


def parse_command(
    argv: Sequence[str],
    classes: Sequence[type] = _CLASSES,
    description: str = "Pretrain an encoder with JEPA.",
) -> tuple[Any, ...]:
    """Parse `[CONFIG.yaml] [--flag value ...]`; flags override the file.

    Args:
        classes: dataclasses whose fields are the flags; default those of an encoder's run.
        description: what --help says first.

    Returns:
        An instance of each class.

    Raises:
        UsageError: an unknown flag or key (naming the nearest valid one), or a value of the wrong kind.
    """
    parser = _Parser(classes, prog="run_jepa.py", description=description, allow_abbrev=False)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        # A pretrained start on the command line takes the place of a recipe's random one.
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
        raise UsageError(f"unknown {_unknown(flag, [f'--{name}' for name in _names(parser)], 'flag')}")
    return tuple(parsed)


def parse_flags(flags: dict[str, Any], classes: Sequence[type] = _CLASSES) -> tuple[Any, ...]:
    """The same from Python: names and values as they are.

    Raises:
        UsageError: an unknown name.
    """
    parser = _Parser(classes)
    valid = _names(parser)
    for name in flags:
        if name not in valid:
            raise UsageError(f"unknown {_unknown(name, valid, 'argument')}")
    return tuple(parser.parse_dict(flags))


def _names(parser: HfArgumentParser) -> list[str]:
    return [item.name for kind in parser.dataclass_types for item in fields(kind) if item.init]


def _unknown(name: str, valid: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_") if what != "flag" else name, valid, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists the valid ones"
    return f"{what} {name}{hint}"


# What a recipe says of an encoder with random weights.
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
    """The file as flags, so that its values are converted and checked as on the command line."""
    content = _yaml_content(path)
    valid = _names(parser)
    for key in content:
        if key not in valid:
            raise UsageError(f"config file {path!r} has the unknown {_unknown(str(key), valid, 'key')}")
    argv = []
    for key, value in content.items():
        if key in leave_out:
            continue
        if isinstance(value, list):
            if not _takes_list(key, parser.dataclass_types):
                raise UsageError(f"config file {path!r}: {key} takes one value, not the list {value}")
            argv += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):  # as YAML reads `save_strategy: no` too
            argv.append(f"--{key}={'yes' if value else 'no'}")
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _takes_list(name: str, classes: Sequence[type]) -> bool:
    hint = next(hints[name] for hints in map(get_type_hints, classes) if name in hints)
    return any(part is list or get_origin(part) is list for part in (hint, *get_args(hint)))
