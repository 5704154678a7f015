"""LoRA: small trainable matrices beside the frozen ones of an encoder (Hu et al. 2021), made by peft."""

import math
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from .errors import UsageError


def _peft() -> ModuleType:
    # Not at the top of the file, because only adapters need it.
    try:
        import peft
    except ModuleNotFoundError:
        raise UsageError("lora needs peft, which is not installed: pip install 'jepa_hf[peft]'") from None
    return peft


def lora_config(settings: dict[str, Any]) -> Any:
    """peft's `LoraConfig`; without `target_modules`, adapters stand beside every linear layer.

    Raises:
        UsageError: peft is not installed, or it does not take these settings.
    """
    try:
        config = _peft().LoraConfig(**{"target_modules": "all-linear", **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"lora takes the arguments of peft.LoraConfig: {' '.join(str(error).split())}") from None
    if type(config.r) is not int or config.r < 1:
        raise UsageError(f"lora_r, the adapters' rank, must be a whole number of at least 1, not {config.r!r:.80}")
    if not isinstance(config.lora_dropout, Real) or not 0.0 <= config.lora_dropout < 1.0:
        raise UsageError(f"lora_dropout must lie in [0, 1), not {config.lora_dropout!r:.80}")
    return config


def add_adapters(encoder: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Put adapters into an encoder, in place. Their product starts at 0: the encoder computes what it did before.

    Raises:
        UsageError: peft is not installed, does not take these settings, or finds no such layers.
    """
    try:
        _peft().inject_adapter_in_model(lora_config(settings), encoder)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"lora finds no place in the encoder: {' '.join(str(error).split())[:300]}") from None


def is_adapter(name: str) -> bool:
    """Whether a parameter of an encoder belongs to an adapter, by its name.

    >>> is_adapter("layers.0.query.lora_A.default.weight"), is_adapter("layers.0.query.base_layer.weight")
    (True, False)
    """
    return ".lora_" in name


@torch.no_grad()
def initialize_adapters(encoder: PreTrainedModel) -> None:
    """Draw those that no checkpoint gave as peft does: the first matrix at random, the second 0."""
    for name, parameter in encoder.named_parameters():
        if ".lora_A." in name:
            init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif ".lora_B." in name:
            init.zeros_(parameter)


def merge_adapters(encoder: PreTrainedModel) -> None:
    """Add the adapters to the matrices that they stand beside and take them out, in place: a plain encoder is left."""
    adapted = _peft().tuners.tuners_utils.BaseTunerLayer
    for name, module in list(encoder.named_modules()):
        if isinstance(module, adapted):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(encoder.get_submodule(parent), attribute, module.get_base_layer())
