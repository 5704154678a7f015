"""Error messages of the command line, and the log levels of the libraries below it."""

import logging
import os
import sys
import time
import warnings
from argparse import ArgumentParser
from typing import NoReturn

from tqdm import tqdm

from ..errors import RunError, UsageError

# Characters of a message on the terminal.
_MAX_MESSAGE_CHARS = 1000
# A launcher ends all ranks as soon as one exits, so the others give rank 0 the time to print.
_OTHER_RANKS_DELAY_S = 10


class CommandParser(ArgumentParser):
    """An `ArgumentParser` that raises a `UsageError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the message without argparse's prefix."""
        raise UsageError(f"{message.removeprefix('argument ').rstrip('.')}. See --help.")


def report_error(command: str, error: Exception) -> int:
    """Print an error in one line and return the exit code: 2 for bad input, 1 for a run that cannot continue.

    All ranks see the same bad input, so only rank 0 prints it. A `RunError` may concern one rank only, so every rank
    prints its own.
    """
    message = str(error)
    if message.startswith("Caught UsageError in "):
        # A data-loader worker sends its traceback as the message; the error itself comes last.
        message = message.rpartition("UsageError: ")[2]
    if isinstance(error, RunError) or os.environ.get("RANK", "0") == "0":
        print(f"{command}: error: {_sanitize(message)}", file=sys.stderr, flush=True)
    else:
        time.sleep(_OTHER_RANKS_DELAY_S)
    return 2 if isinstance(error, UsageError) else 1


def _sanitize(message: str) -> str:
    """Return the message in one line of limited length, control characters escaped.

    Names in it come from files and may contain anything, terminal escape sequences included.
    """
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[: _MAX_MESSAGE_CHARS // 2]} ... {message[-_MAX_MESSAGE_CHARS // 2 :]}"
    message = " ".join(message.split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in message
    )


class _Handler(logging.Handler):
    """Prints messages on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def quiet_libraries() -> None:
    """Silence the libraries' warnings, under which the command's own messages would be lost."""
    import datasets  # these two take seconds
    import transformers

    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_Handler()])
    is_rank0 = os.environ.get("RANK", "0") == "0"  # all ranks would log the same
    logging.getLogger("jepa_hf").setLevel(logging.INFO if is_rank0 else logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # for weights; training has its own bar
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # where each update of a bar would be a line
        datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*worker processes in total.*")  # torch, about dataloader_num_workers
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # torch, about accelerate's argument
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")  # torch: renamed since 2.6
    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")  # intended here
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft, about transformers' attribute
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if os.environ.get("WORLD_SIZE") else "true")
