"""LoRA (Hu et al. 2021) in encoders: adding, initializing and merging adapters with peft."""

import math
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from .encoders import is_pooler_parameter
from .errors import UsageError, one_line


def _peft() -> ModuleType:
    # peft is an optional dependency.
    try:
        import peft
    except ModuleNotFoundError:
        raise UsageError("lora needs peft, which is not installed. Run pip install 'jepa_hf[peft]'.") from None
    return peft


def lora_config(settings: dict[str, Any]) -> Any:
    """Build a `peft.LoraConfig`; by default every linear layer gets an adapter.

    Raises:
        UsageError: peft is not installed or rejects the settings.
    """
    try:
        config = _peft().LoraConfig(**{"target_modules": "all-linear", **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"Expected lora to hold arguments of peft.LoraConfig: {one_line(error)}.") from None
    check_lora_numbers(config.r, config.lora_dropout)
    return config


def check_lora_numbers(rank: Any, dropout: Any) -> None:
    """Raise a `UsageError` for a rank or a dropout out of range; peft is not needed."""
    if type(rank) is not int or rank < 1:
        raise UsageError(f"lora_r, the adapters' rank, must be an integer of at least 1, not {rank!r:.80}.")
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise UsageError(f"lora_dropout must be in [0, 1), not {dropout!r:.80}.")


def add_lora(encoder: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Add adapters to an encoder in place. Their product starts at 0, so its outputs do not change.

    A pooler gets none, because it gets no gradient.

    Raises:
        UsageError: peft is not installed, rejects the settings, or finds no matching layer.
    """
    if pooler := [name for name, _ in encoder.named_modules() if is_pooler_parameter(name)]:
        settings = {"exclude_modules": pooler, **settings}
    try:
        _peft().inject_adapter_in_model(lora_config(settings), encoder)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"No module of the encoder matches lora's target_modules: {one_line(error):.300}") from None


def is_lora_parameter(name: str) -> bool:
    """Return whether the parameter of this name belongs to an adapter.

    >>> is_lora_parameter("layers.0.query.lora_A.default.weight"), is_lora_parameter("layers.0.query.base_layer.weight")
    (True, False)
    """
    return ".lora_" in name


@torch.no_grad()
def initialize_lora(encoder: PreTrainedModel) -> None:
    """Initialize adapters that no checkpoint contained, as peft does: A at random, B to 0."""
    for name, parameter in encoder.named_parameters():
        if ".lora_A." in name:
            init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif ".lora_B." in name:
            init.zeros_(parameter)


@torch.no_grad()
def scale_lora(encoder: PreTrainedModel, settings: dict[str, Any], factor: float) -> None:
    """Multiply what the adapters add to the weights by a factor, in place.

    Raises:
        UsageError: with DoRA or trained biases the adapters do not only add to the weights.
    """
    for name, plain in (("use_dora", False), ("bias", "none")):
        if settings.get(name, plain) != plain:
            raise UsageError(f"Adapters with {name} {settings[name]!r} cannot be averaged with the start.")
    for name, parameter in encoder.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            parameter.mul_(factor)


def merge_lora(encoder: PreTrainedModel) -> None:
    """Merge the adapters into the weights in place, which leaves a plain encoder."""
    lora_layer_type = _peft().tuners.tuners_utils.BaseTunerLayer
    for name, module in list(encoder.named_modules()):
        if isinstance(module, lora_layer_type):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(encoder.get_submodule(parent), attribute, module.get_base_layer())
