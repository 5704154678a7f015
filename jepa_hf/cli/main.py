"""`jepa-hf`: the console command."""

import argparse
import gc
import os
import subprocess  # nosec B404
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ..version import __version__

_HELP = """\
usage: jepa-hf COMMAND ...

  train    pretrain an encoder, or with --objective llm fine-tune a language model with two views of its rows: jepa-hf
           train [CONFIG.yaml] [--flag value ...]; with --accelerate_config FILE it is
           started by `accelerate launch` with that configuration
  masks    draw what train with the same flags would hide: jepa-hf masks [CONFIG.yaml] [--flag value ...]
  evaluate how good are frozen encoders: probes, similarity, retrieval: jepa-hf evaluate MODEL ... --tasks FILE ...
  generate what language models answer to rows, and how much is right: jepa-hf generate MODEL ... --data_file FILE
  export   from a checkpoint to a plain encoder, a masked language model, or a model that brings its code
  report   one HTML page about a run, its curves read in sentences: jepa-hf report RUN_DIR
  embed    one vector per row of files: jepa-hf embed MODEL FILES --output x.parquet
  push     a run's result to the Hub: jepa-hf push RUN_DIR user/name

`jepa-hf COMMAND --help` lists a command's options.
"""


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    Ranks on CPUs skip the interpreter's shutdown: after their work is done, gloo's threads now and then abort it (torch
    2.13: 7 of 60 runs, with and without `destroy_process_group`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def console() -> NoReturn:
    """The process of `jepa-hf`."""
    gc.freeze()  # for the reason that run_jepa.py gives
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a command; returns the exit code."""
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
    if command == "masks":
        from .masks import main as masks

        return masks(rest)
    if command == "evaluate":
        from .evaluate import main as evaluate

        return evaluate(rest)
    if command == "generate":
        from .generate import main as generate

        return generate(rest)
    if command == "export":
        from .export import main as export

        return export(rest)
    if command == "report":
        from .report import main as report

        return report(rest)
    if command == "embed":
        from .embed import main as embed

        return embed(rest)
    if command == "push":
        from .push import main as push

        return push(rest)
    print(
        f"jepa-hf: error: unknown command {command!r}; the commands are train, masks, evaluate, generate, export, "
        "report, embed and push",
        file=sys.stderr,
    )
    return 2


def _train(arguments: list[str]) -> int:
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--accelerate_config", "--accelerate-config"):
            value = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
            if not Path(value).is_file():
                print(
                    f"jepa-hf train: error: accelerate_config {value!r} is no file; name one like those in "
                    "configs/accelerate",
                    file=sys.stderr,
                )
                return 2
            rest = arguments[:index] + arguments[index + (1 if "=" in argument else 2) :]
            rest, tokens = _without_tokens(rest)
            if len(tokens) > 1:
                print(
                    "jepa-hf train: error: token and hub_token differ; with accelerate_config give one, for both",
                    file=sys.stderr,
                )
                return 2
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", value]
            command = [*launch, "-m", "jepa_hf.cli", "train", *rest]
            # No shell: this Python, and the user's own flags.
            return subprocess.call(command, env=os.environ | dict(zip(("HF_TOKEN",), tokens, strict=False)))  # nosec B603
    from .train import main as train

    return train(arguments, command="jepa-hf train")


def _without_tokens(arguments: list[str]) -> tuple[list[str], set[str]]:
    """The arguments without the Hub's tokens, and these: other processes get them where no process list shows them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--token", "--hub_token", "--hub-token", dest="tokens", action="append", default=[])
    found, rest = parser.parse_known_args(arguments)
    return rest, set(found.tokens)
