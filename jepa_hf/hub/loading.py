"""Loading of pretrained models, with failures as one-line `UsageError`s."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError, one_line


@contextmanager
def hidden_loading_bars() -> Iterator[None]:
    """Hide transformers' bars of weights, which would break those of a run; downloads keep theirs."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    hides_downloads = are_progress_bars_disabled()  # transformers' switch also moves the Hub client's
    transformers_logging.disable_progress_bar()
    if not hides_downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        if hides_downloads:
            disable_progress_bars()


def load_or_usage_error(name: str, loader: Callable[..., Any], kwargs: dict[str, Any], argument: str = "") -> Any:
    """Call a `from_pretrained` method and turn its failures into one-line errors.

    `argument` is the command-line argument with the name of the model, for error messages.
    """
    label = f"{argument} {name!r}".strip()
    try:
        with hidden_loading_bars(), zero3_init_disabled():
            return loader(name, **kwargs)
    except UsageError:
        raise
    except (
        # The last four occur for values of the wrong type in a file.
        OSError, ValueError, RuntimeError, ImportError, SafetensorError, TypeError, AttributeError, LookupError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        reason = one_line(error)[:300]
        if "trust_remote_code" in str(error):
            reason = "it contains custom code; read it, and pass --trust_remote_code if you trust it"
        elif "ignore_mismatched_sizes" in reason:
            reason = "its weights do not have the shapes that the flags request; leave out flags that change shapes"
        elif Path(name).is_file():
            raise UsageError(f"{label} is a file; name the directory of a model") from None
        elif not Path(name).is_dir():
            offline = " (HF_HUB_OFFLINE is set, so only its cache was searched)" if constants.HF_HUB_OFFLINE else ""
            raise UsageError(
                f"{label} is neither a local directory nor a model on the Hub{offline}; check the name and the "
                "network, and log in with `hf auth login` if it is private"
            ) from None
        elif not (Path(name) / "config.json").is_file() and not (Path(name) / "adapter_config.json").is_file():
            inner = next((f", such as {path.parent}" for path in sorted(Path(name).glob("*/config.json"))), "")
            reason = f"the directory has no config.json; name one that holds a model{inner}"
        raise UsageError(f"{label} cannot be loaded: {reason}") from None
