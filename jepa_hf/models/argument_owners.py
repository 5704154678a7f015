"""Owners of arguments that were passed to a class of another kind."""

from .argument_names import owner_of
from .configuration_jepa import JepaConfig


def owner_of_argument(name: str, llm: bool = False) -> str | None:
    """Return the classes and functions that take an argument, also those of the model.

    >>> owner_of_argument("mlm_weight")
    'JepaConfig, from_encoder_pretrained or pretrain, for a JEPA of an encoder'
    >>> owner_of_argument("ema_decay", llm=True)
    'LlmJepaTrainingArguments'

    Args:
        name: the argument.
        llm: prefer the classes of LLM-JEPA.
    """
    if name in JepaConfig.argument_names():
        return "JepaConfig, from_encoder_pretrained or pretrain, for a JEPA of an encoder"
    return owner_of(name, llm)
