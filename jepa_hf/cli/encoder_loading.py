"""From names and flags to an encoder's configuration, a model, and all that a run prepares."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..data.arguments import DataArguments
from ..distributed.deepspeed_state import whole_weights
from ..errors import UsageError
from ..hub.loading import load_pretrained
from ..masking.base_collator import MaskingCollator
from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass
from .arguments import ModelArguments

FAMILIES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")
VISION_FAMILIES = ("ijepa", "vit", "dinov2", "dinov2_with_registers")


@dataclass
class Prepared:
    """All that a run needs, checked; nothing of it has been written.

    Args:
        model: the JEPA.
        collator: makes its batches.
        train_dataset, eval_dataset: what the collator reads; None where there is no evaluation.
        processing_class: tokenizer or image processor; None for feature vectors.
    """

    model: JepaForRepresentationPrediction
    collator: MaskingCollator
    train_dataset: Any
    eval_dataset: Any
    processing_class: ProcessingClass | None = None


def hub_kwargs(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """Those that say where to find a file."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "token": data_args.token,
        "cache_dir": data_args.cache_dir,
    }


def load_encoder_config(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedConfig:
    """The encoder's configuration: the pretrained one's, or that of a random start."""
    name = model_args.model_name_or_path or model_args.config_name
    if name is None:
        try:
            config = AutoConfig.for_model(model_args.model_type)
        except UsageError:
            raise
        except ValueError:
            raise UsageError(
                f"model_type {model_args.model_type!r} is not one that transformers knows; use "
                f"{', '.join((*FAMILIES, *VISION_FAMILIES))}"
            ) from None
    else:
        argument = "model_name_or_path" if model_args.model_name_or_path else "config_name"
        config = load_pretrained(name, AutoConfig.from_pretrained, hub_kwargs(model_args, data_args), argument)
    if isinstance(config, JepaConfig):
        config = config.encoder_config
    return overridden(config, model_args.config_overrides, is_default=name is None)


def overridden(config: PreTrainedConfig, overrides: str | None, is_default: bool = False) -> PreTrainedConfig:
    """The configuration with `name=value,name=value` changed, and what follows from them.

    Args:
        is_default: it is its class's own, so that all the rest (a Llama's `head_dim`) follows from what is given.
    """
    if not overrides:
        return config
    try:
        config.update_from_string(overrides)
        values = config.to_dict()
        if is_default:
            values = {name: values[name] for name in dict(part.split("=") for part in overrides.split(","))}
        elif len(values.get("layer_types") or ()) != config.num_hidden_layers:
            values.pop("layer_types", None)  # ModernBERT's follow from the number of layers
        return type(config).from_dict(values)
    except (ValueError, IndexError, TypeError, StrictDataclassError) as error:
        raise UsageError(
            f"config_overrides {overrides!r} must have the form name=value,name=value with names of the "
            f"{config.model_type} configuration: {' '.join(str(error).split())}"
        ) from None


def load_tokenizer(argument: str, name: str, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer without chat templates: no encoder needs them, and their names would become names of files."""
    tokenizer = load_pretrained(name, AutoTokenizer.from_pretrained, kwargs, argument)
    tokenizer.chat_template = None
    return tokenizer


def longest_row(possible: float, tokenizer: PreTrainedTokenizerBase | None, asked: int | None) -> int:
    """The longest row, in tokens: what is asked for, or what model and tokenizer allow, 512 at most.

    Args:
        possible: positions of the model.
        tokenizer: None where one is trained for the length.
        asked: `max_seq_length`.

    Raises:
        UsageError: more than the model has positions.
    """
    if asked is None:
        return min(possible, 512, tokenizer.model_max_length if tokenizer is not None else 512)
    if asked > possible:
        raise UsageError(
            f"max_seq_length {asked} is more than the {possible} positions of the model; use at most {possible}"
        )
    return asked


def build_model(
    model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig
) -> JepaForRepresentationPrediction:
    """The JEPA around the pretrained encoder, or around a random one of this configuration."""
    attention = (
        {} if model_args.attn_implementation is None else {"attn_implementation": model_args.attn_implementation}
    )
    if model_args.model_name_or_path is None:
        try:
            jepa_config = JepaConfig.for_encoder(config, **model_args.jepa_kwargs())
            with whole_weights():
                return JepaForRepresentationPrediction._from_config(jepa_config, **attention)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"no {config.model_type} encoder can be built like that: {error}") from None
    return load_pretrained(
        model_args.model_name_or_path,
        lambda name, **kwargs: JepaForRepresentationPrediction.from_any_pretrained(
            name, encoder_kwargs=kwargs, **model_args.jepa_kwargs()
        ),
        {**hub_kwargs(model_args, data_args), **attention},
        "model_name_or_path",
    )
