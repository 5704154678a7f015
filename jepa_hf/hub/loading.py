"""Loading what others saved, each mistake with its sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..distributed.deepspeed_state import whole_weights
from ..errors import UsageError


def load_pretrained(name: str, loader: Callable[..., Any], kwargs: dict[str, Any], argument: str = "") -> Any:
    """Call a `from_pretrained`, turning its long explanations into a sentence.

    Args:
        name: a directory, or a name on the Hub.
        loader: called with the name and `kwargs`.
        argument: whose value the name is, for the sentence.

    Raises:
        UsageError: nothing that can be loaded lies there.
    """
    called = f"{argument} {name!r}".strip()
    try:
        with whole_weights():
            return loader(name, **kwargs)
    except UsageError:
        raise
    except (
        # The last four: values of the wrong kind in a file.
        OSError, ValueError, RuntimeError, ImportError, SafetensorError, TypeError, AttributeError, LookupError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own; read it, and if you trust it run it with --trust_remote_code"
        elif "ignore_mismatched_sizes" in reason:
            reason = "its weights have other sizes than the flags ask for; leave out those that change its sizes"
        elif not Path(name).is_dir():
            raise UsageError(
                f"{called} is neither a directory here nor a model that the Hub gave; check the name and the network, "
                "and for a private one log in with `hf auth login`"
            ) from None
        raise UsageError(f"{called} cannot be loaded: {reason}") from None
