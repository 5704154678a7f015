"""Checks of a training command that need no library: its recipe, its flags, its files.

Importing torch and transformers takes seconds, in which a mistyped flag should not wait for its message. The names of
flags are therefore read from the sources of the argument classes.
"""

import argparse
import ast
import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml

from ..errors import UsageError, one_line
from .requirements import check_packages

_PACKAGE = Path(__file__).parents[1]
# Files and classes whose fields are the flags, by objective; transformers' are added.
_SHARED_CLASSES = {
    "training/training_args.py": ("BaseJepaTrainingArguments",),
    "data/arguments.py": ("BaseDataArguments",),
    "cli/arguments.py": ("BaseModelArguments", "CommandArguments"),
}
_ENCODER_CLASSES = {
    "training/training_args.py": ("JepaTrainingArguments",),
    "data/arguments.py": ("DataArguments",),
    "cli/arguments.py": ("ModelArguments", "MaskArguments"),
}
_LLM_CLASSES = {
    "cli/llm_arguments.py": ("LlmModelArguments", "ViewArguments", "GenerationArguments"),
    "llm_jepa/paired_data.py": ("PairedDataArguments",),
    "llm_jepa/training_args.py": ("LlmJepaTrainingArguments",),
}

# Names in other libraries, and the flag here.
_FLAG_OF = {
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_length": "max_seq_length",
    "model": "model_name_or_path",
    "context_mode": "masked_tokens",
    "target_layers": "average_top_k_layers",
}


def check_train_command(argv: Sequence[str]) -> None:
    """Check the recipe, the names of keys and flags, their packages, and data files."""
    objective = peek_objective(argv)
    valid = flag_names(objective)
    is_recipe = bool(argv) and not argv[0].startswith("-")
    values = dict(read_valid_recipe(argv[0], objective)) if is_recipe else {}
    flag = ""
    for argument in argv[is_recipe:]:
        if not argument.startswith("--"):
            values.setdefault(flag, []).append(argument)
            continue
        name, has_value, value = argument.partition("=")
        flag = name.removeprefix("--").replace("-", "_")
        if flag not in valid and flag.removeprefix("no_") not in valid:
            raise UsageError(f"Unknown {describe_unknown(name, valid, 'flag', objective)}")
        values[flag] = [value] if has_value else []
    check_packages({name: _single(value) for name, value in values.items()})
    for name in ("train_file", "validation_file"):
        files = _single(values.get(name))
        if isinstance(files, str):
            missing = missing_file(files)
            if missing is not None:
                raise UsageError(f"{name} {missing!r} does not exist. Check the path.")


def _single(value: Any) -> Any:
    """Return the value of a flag: True without one, a list for several."""
    if not isinstance(value, list) or len(value) > 1:
        return value
    return value[0] if value else True


def missing_file(files: str) -> str | None:
    """Return the first of the paths that does not exist; globs and URLs are left to the readers."""
    paths = [files] if Path(files).exists() else map(str.strip, files.split(","))
    is_left = re.compile(r"[*?[]|://").search
    return next((path for path in paths if path and not is_left(path) and not Path(path).exists()), None)


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
        objective = read_recipe(argv[0]).get("objective")
    return objective


def read_recipe(path: str) -> dict[Any, Any]:
    """Read the keys and values of a YAML file."""
    if not Path(path).is_file():
        raise UsageError(f"Config file {path!r} does not exist. Check the path.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"Config file {path!r} is not valid YAML: {one_line(error)}. Correct this line.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"Config file {path!r} must hold lines of the form `key: value`. Write one setting per line.")
    return content


def read_valid_recipe(path: str, objective: str | None) -> dict[str, Any]:
    """Read a recipe, whose keys must be flags of the objective."""
    content, valid = read_recipe(path), flag_names(objective)
    for key in content:
        if key not in valid:
            raise UsageError(
                f"Config file {path!r} has the unknown {describe_unknown(str(key), valid, 'key', objective)}"
            )
    return content


@cache
def flag_names(objective: str | None) -> set[str]:
    """Return the names of the flags of an objective.

    >>> "jepa_weight" in flag_names("llm"), "jepa_weight" in flag_names("span"), "seed" in flag_names("span")
    (True, False, True)
    """
    transformers = Path(cast(str, cast(ModuleSpec, find_spec("transformers")).origin))
    names = _class_fields(transformers.with_name("training_args.py"), ("TrainingArguments",))
    for classes in (_SHARED_CLASSES, _LLM_CLASSES if objective == "llm" else _ENCODER_CLASSES):
        for path, wanted in classes.items():
            names |= _class_fields(_PACKAGE / path, wanted)
    return names


def _class_fields(path: Path, classes: Sequence[str]) -> set[str]:
    """Return the annotated names in the bodies of classes."""
    return {
        statement.target.id
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if "ClassVar" not in ast.unparse(statement.annotation)
    }


def suggestion(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """Name the valid name that a misspelt one probably means; empty if no valid name is near.

    >>> suggestion("hiden_size", ["hidden_size", "vocab_size"])
    ' Did you mean hidden_size?'
    """
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.75)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def describe_unknown(name: str, valid: Iterable[str], kind: str, objective: str | None = None) -> str:
    """Describe an unknown flag, key or argument, and the valid one that was probably meant.

    >>> describe_unknown("--lerning_rate", ["learning_rate"], "flag")
    'flag --lerning_rate. Did you mean --learning_rate?'
    """
    key, dashes = name.lstrip("-").replace("-", "_"), "--" if kind == "flag" else ""
    if key in flag_names(None if objective == "llm" else "llm"):
        others, this = ("span, images and features", "llm") if objective == "llm" else ("llm", objective or "span")
        hint = f" It is for the objective {others}, and this run's is {this}. Omit it."
    elif key in _FLAG_OF:
        hint = f" Did you mean {dashes}{_FLAG_OF[key]}?"
    else:
        hint = suggestion(key, valid, dashes) or " See --help_all for all flags."
    return f"{kind} {name}.{hint}"
