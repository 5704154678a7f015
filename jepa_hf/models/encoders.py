"""Building and loading the encoder of a configuration, with or without its pooler."""

import copy
import inspect
from typing import Any, cast

import torch
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_feature_encoder import FeatureEncoderConfig
from .modeling_feature_encoder import FeatureEncoderModel
from .upstream import build_from_config


def encoder_from_config(config: PreTrainedConfig, add_pooling_layer: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Build a randomly initialized encoder, by default without pooler, which JEPA does not train."""
    if config.model_type == FeatureEncoderConfig.model_type:
        return build_from_config(FeatureEncoderModel, config, **kwargs)
    without_pooler = {} if add_pooling_layer else no_pooler_argument(config)
    return AutoModel.from_config(config, **without_pooler, **kwargs)


def encoder_and_loading_info(
    name_or_path: str, config: PreTrainedConfig, keep_pooler: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a pretrained encoder, from a plain checkpoint or one with a task head, by `from_pretrained(**kwargs)`.

    With `keep_pooler` its pooler is loaded too, if it has one that is not `untrained_pooler`.

    Returns:
        The encoder, and the missing and unexpected weights as `from_pretrained` reports them.
    """
    kwargs |= {"config": config, "output_loading_info": True}
    if config.model_type == FeatureEncoderConfig.model_type:
        return cast(Any, FeatureEncoderModel).from_pretrained(name_or_path, **kwargs)
    without_pooler = no_pooler_argument(config)
    encoder, info = AutoModel.from_pretrained(name_or_path, **without_pooler, **kwargs)
    # Loaded twice, because a pooler that the checkpoint lacks would be drawn at random.
    if keep_pooler and without_pooler and any(".pooler." in f".{name}" for name in info["unexpected_keys"]):
        complete = AutoModel.from_pretrained(name_or_path, **kwargs)
        state = complete[0].state_dict()
        if not all(torch.equal(state[name].cpu(), value) for name, value in untrained_pooler(encoder).items()):
            return complete
    return encoder, info


def untrained_pooler(encoder: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Draw the weights of a pooler that `AutoModel` builds and the encoder lacks, always the same.

    No configuration makes `AutoModel` leave the pooler out. An export without its weights would load
    with others each time, and with a table of missing weights.

    Returns:
        Parameters by name; empty for families without pooler.
    """
    if not no_pooler_argument(encoder.config):
        return {}
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = 1  # the pooler does not depend on the layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = encoder_from_config(config, add_pooling_layer=True, dtype=encoder.dtype).state_dict()
    return {name: value for name, value in state.items() if is_pooler_parameter(name)}


def is_pooler_parameter(name: str) -> bool:
    """Return whether the encoder's parameter of this name belongs to its pooler."""
    return name.startswith("pooler.")


def no_pooler_argument(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the keyword argument that disables the pooler, if `AutoModel` builds one by default."""
    model_class: Any = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    argument = inspect.signature(model_class.__init__).parameters.get("add_pooling_layer")
    return {} if argument is None or argument.default is False else {"add_pooling_layer": False}
