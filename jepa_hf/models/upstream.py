"""Undocumented names of transformers, one function each.

Last seen in transformers 5.24. `tests/models/test_upstream.py` has a contract for each: it fails
with the name when an upgrade moves it.
"""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import install_output_capuring_hook, maybe_install_capturing_hooks


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return the attention implementation of a model with this configuration."""
    return config._attn_implementation


def build_from_config(model_class: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> Any:
    """Build a model with random weights, in the given `dtype` and `attn_implementation`.

    `AutoModel.from_config` would look up the class again, and code in a checkpoint has its own.
    """
    return model_class._from_config(config, **kwargs)


def install_capturing_hooks(encoder: PreTrainedModel) -> None:
    """Install the hooks that record hidden states and attentions, in a form that pickles.

    transformers would install them on first use, which splits a torch.compile graph into five. Its
    hooks are local functions, which do not pickle.
    """
    maybe_install_capturing_hooks(encoder)
    for module in encoder.modules():
        hooks = module._forward_hooks
        for key, hook in hooks.items():
            if inspect.isfunction(hook) and hook.__module__ == install_output_capuring_hook.__module__:
                variables = inspect.getclosurevars(hook).nonlocals
                names = inspect.signature(install_output_capuring_hook).parameters
                hooks[key] = OutputCapturingHook({name: variables[name] for name in names if name in variables})


class OutputCapturingHook:
    """A forward hook of `install_output_capuring_hook`, rebuilt from its arguments on unpickling."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        module = nn.Identity()
        install_output_capuring_hook(module, **arguments)
        (self.hook,) = module._forward_hooks.values()

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Record the output."""
        return self.hook(module, args, output)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (self.arguments,)
