"""`jepa-hf`: the console command."""

import argparse
import gc
import os
import subprocess  # nosec B404
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch

from ..version import __version__

# Modules of this folder, each with a `main(argv) -> int`.
_COMMANDS = ("masks", "evaluate", "generate", "export", "report", "embed", "push")

_HELP = """\
usage: jepa-hf COMMAND ...

  train    pretrain an encoder; with --objective llm, fine-tune a language model on two views of each row:
           jepa-hf train [CONFIG.yaml] [--flag value ...]; --accelerate_config FILE starts it with `accelerate launch`
  masks    draw the masks that train would use with the same flags: jepa-hf masks [CONFIG.yaml] [--flag value ...]
  evaluate compare frozen encoders by probes, similarity and retrieval: jepa-hf evaluate MODEL ... --tasks FILE ...
  generate generate answers with language models and score them: jepa-hf generate MODEL ... --data_file FILE
  export   write a plain encoder, a masked language model, or a model with its code: jepa-hf export SOURCE OUTPUT_DIR
  report   write one HTML page about a run, its curves explained in sentences: jepa-hf report RUN_DIR
  embed    write one vector per row of files: jepa-hf embed MODEL FILES --output x.parquet
  push     push the result of a run to the Hub: jepa-hf push RUN_DIR user/name

`jepa-hf COMMAND --help` lists a command's options.
"""


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code.

    Ranks on CPUs skip the interpreter's shutdown, which gloo's threads occasionally abort after the work is done
    (torch 2.13: 7 of 60 runs, with and without `destroy_process_group`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def entry_point() -> NoReturn:
    """Run the console command `jepa-hf` and end the process."""
    gc.freeze()  # see run_jepa.py
    exit_process(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(__version__)
        return 0
    if command == "train":
        return _train(rest)
    if command in _COMMANDS:
        # Imported here because each command brings other libraries.
        return import_module(f".{command}", __package__).main(rest)
    print(
        f"jepa-hf: error: unknown command {command!r}; the commands are train, {', '.join(_COMMANDS[:-1])} and "
        f"{_COMMANDS[-1]}",
        file=sys.stderr,
    )
    return 2


def _train(arguments: list[str]) -> int:
    """Train in this process, or with --accelerate_config in processes that accelerate launches."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--accelerate_config", "--accelerate-config"):
            value = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
            if not Path(value).is_file():
                print(
                    f"jepa-hf train: error: accelerate_config {value!r} is not a file; name one like those in "
                    "configs/accelerate",
                    file=sys.stderr,
                )
                return 2
            rest = arguments[:index] + arguments[index + (1 if "=" in argument else 2) :]
            rest, tokens = _strip_hub_tokens(rest)
            if len(tokens) > 1:
                print(
                    "jepa-hf train: error: token and hub_token differ; with accelerate_config give one, for both",
                    file=sys.stderr,
                )
                return 2
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", value]
            command = [*launch, "-m", "jepa_hf.cli", "train", *rest]
            # Safe: no shell, this Python, and the user's own flags.
            return subprocess.call(command, env=os.environ | dict(zip(("HF_TOKEN",), tokens, strict=False)))  # nosec B603
    from .train import main as train

    return train(arguments, command="jepa-hf train")


def _strip_hub_tokens(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Separate the Hub's tokens from the other arguments, because a process list would show them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--token", "--hub_token", "--hub-token", dest="tokens", action="append", default=[])
    options, rest = parser.parse_known_args(arguments)
    return rest, set(options.tokens)
