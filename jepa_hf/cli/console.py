"""What the command line prints of errors, and how it quiets the libraries."""

import logging
import os
import sys
import time
import warnings

import datasets
import transformers

from ..errors import RunError, UsageError

# Characters of a sentence on the terminal.
_LONGEST = 1000
# Seconds that other ranks wait: a launcher ends all ranks when one leaves, and the one that tells may be slower.
_PATIENCE = 10


def complain(command: str, error: Exception) -> int:
    """Print the sentence and return the exit code: 2 for bad input, 1 for a run that cannot go on.

    Of bad input all processes know the same, and one tells; a run may have ended for what one of them alone met.
    """
    sentence = str(error)
    if sentence.startswith("Caught UsageError in "):
        # A loader's worker sends its whole traceback as the message; the sentence is its end.
        sentence = sentence.rpartition("UsageError: ")[2]
    if isinstance(error, RunError) or os.environ.get("RANK", "0") == "0":
        print(f"{command}: error: {_in_one_line(sentence)}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE)
    return 2 if isinstance(error, UsageError) else 1


def _in_one_line(sentence: str) -> str:
    """Names that files bring may hold anything, orders to the terminal too, and be of any length."""
    if len(sentence) > _LONGEST:
        sentence = f"{sentence[: _LONGEST // 2]} ... {sentence[-_LONGEST // 2 :]}"
    sentence = " ".join(sentence.split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in sentence
    )


def quiet_libraries() -> None:
    """Their warnings would bury our sentence; what matters we say ourselves."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("jepa_hf").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of reading and writing weights; training has its own
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # torch's, of a name of accelerate's
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")  # torch's, whose new name older ones lack
    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")  # which is as it should be
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's, of a name of transformers'
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if os.environ.get("WORLD_SIZE") else "true")
