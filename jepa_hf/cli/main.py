"""`jepa-hf`: the console command."""

import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ..errors import UsageError
from ..utils.streams import print_all_characters
from ..version import __version__
from . import masks
from .console import CommandParser, quiet_libraries, report_error
from .help import short_help
from .options import PARSERS
from .quick_checks import check_train_command, peek_objective, suggestion
from .requirements import check_packages

_COMMANDS = ("train", "masks", *PARSERS)

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
    torch = sys.modules.get("torch")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (torch and torch.cuda.is_available()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_process(command: Callable[..., int], *arguments: Any) -> NoReturn:
    """Run a command and end this process with its exit code.

    It is 130 after Ctrl-C, and 141, as for SIGPIPE, if nobody reads the output.
    """
    print_all_characters()
    try:
        try:
            code = command(*arguments)
        finally:  # also after argparse's help
            sys.stdout.flush()
    except KeyboardInterrupt as interruption:  # training handles its own
        if os.environ.get("RANK", "0") == "0":
            message = str(interruption) or "Run the same command again."
            print(f"\nInterrupted. {message}", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush
        code = 128 + signal.SIGPIPE
    exit_process(code)


def _is_closed(stream: TextIO) -> bool:
    """Return whether the reader of a pipe, such as `head`, has closed it."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def entry_point() -> NoReturn:
    """Run the console command `jepa-hf` and end the process."""
    gc.freeze()  # see run_jepa.py
    run_process(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(_HELP, file=sys.stderr)
        return 2
    command, rest = arguments[0], arguments[1:]
    if command in ("-h", "--help", "--version"):
        print(__version__ if command == "--version" else _HELP)
        return 0
    if command == "train":
        return train(rest, "jepa-hf train")
    if command == "masks":
        return masks.main(rest)
    try:
        if command not in PARSERS:
            message = f"The commands are {', '.join(_COMMANDS[:-1])} and {_COMMANDS[-1]}."
            raise UsageError(f"Unknown command {command!r}.{suggestion(command, _COMMANDS)} {message}")
        options = PARSERS[command]().parse_args(rest)
        check_packages({command: True, **vars(options)})
        quiet_libraries()
        return import_module(f".{command}", __package__).run(options) or 0
    except UsageError as error:
        return report_error(f"jepa-hf {command}" if command in PARSERS else "jepa-hf", error)


def train(arguments: Sequence[str], command: str) -> int:
    """Check a training command, and run it here, or with --accelerate_config in processes of accelerate's launcher."""
    try:
        parser = CommandParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--accelerate_config", "--accelerate-config", dest="config", nargs="?", const="")
        options, rest = parser.parse_known_args(list(arguments))
        config = options.config
        if config is not None and not Path(config).is_file():
            raise UsageError(f"accelerate_config {config!r} is not a file. Name one like those in configs/accelerate.")
        help_flags = {"-h", "--help", "--help_all", "--help-all"} & set(rest)
        check_train_command([argument for argument in rest if argument not in help_flags])
        if help_flags <= {"-h", "--help"} and help_flags:
            print(short_help(command, peek_objective(rest)))
            return 0
        if help_flags:
            _print_complete_help(command, peek_objective(rest))
            return 0
        if config is not None:
            return _launch(config, rest)
    except UsageError as error:
        return report_error(command, error)
    return import_module(".train", __package__).main(rest, command)


def _print_complete_help(command: str, objective: str | None) -> None:
    """Print the help on all flags, for which `TrainingArguments` imports torch: seconds, after a line about them."""
    if sys.stderr.isatty():
        print("collecting all options ...", file=sys.stderr, flush=True)
    parsing = import_module(".parsing", __package__)
    classes = (import_module(".llm_arguments", __package__).LLM_CLASSES,) if objective == "llm" else ()
    print(parsing.complete_help(command, *classes))


def _launch(config: str, arguments: list[str]) -> int:
    """Train in the processes of an accelerate configuration; returns the exit code of the first that failed."""
    # Without the Hub's tokens, which a process list would show.
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--token", "--hub_token", "--hub-token", dest="tokens", action="append", default=[])
    options, rest = parser.parse_known_args(arguments)
    if len(set(options.tokens)) > 1:
        raise UsageError("token and hub_token differ. With accelerate_config, give one for both.")
    if options.tokens:
        os.environ["HF_TOKEN"] = options.tokens[0]
    return import_module("..distributed.launch", __package__).launch(config, ["-m", "jepa_hf.cli", "train", *rest])
