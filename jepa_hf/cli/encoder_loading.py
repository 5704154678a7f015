"""Loading of encoder configurations, tokenizers and models; the components of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from ..data.arguments import DataArguments
from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError, one_line
from ..hub.loading import load_or_usage_error
from ..masking.base_collator import MaskingCollator
from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..training.run_directory import check_has_model
from ..utils.types import ProcessingClass
from .arguments import BaseModelArguments, ModelArguments
from .quick_checks import suggestion

T = TypeVar("T")

TEXT_MODEL_TYPES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")
VISION_MODEL_TYPES = ("ijepa", "vit", "dinov2", "dinov2_with_registers")
SUPPORTED = (
    f"Supported are {', '.join(TEXT_MODEL_TYPES)}, for images {', '.join(VISION_MODEL_TYPES)}, and for rows of numbers "
    "feature_encoder."
)


@dataclass
class TrainingComponents:
    """Components of a training run; there is no processing class for feature vectors."""

    model: JepaForRepresentationPrediction
    collator: MaskingCollator
    train_dataset: Any
    eval_dataset: Any
    processing_class: ProcessingClass | None = None


def hub_kwargs(model_args: BaseModelArguments, data_args: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that locate files on the Hub."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "token": data_args.token,
        "cache_dir": data_args.cache_dir,
    }


def load_encoder_config(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedConfig:
    """Load the configuration of the pretrained encoder, or create that of a random start."""
    name = model_args.model_name_or_path or model_args.config_name
    if name is None:
        try:
            config = AutoConfig.for_model(str(model_args.model_type))
        except ValueError:
            meant = suggestion(str(model_args.model_type), (*TEXT_MODEL_TYPES, *VISION_MODEL_TYPES))
            raise UsageError(
                f"model_type {model_args.model_type!r} is not that of an encoder.{meant} {SUPPORTED}"
            ) from None
    else:
        argument = "model_name_or_path" if model_args.model_name_or_path else "config_name"
        check_has_model(argument, name)
        config = load_or_usage_error(name, AutoConfig.from_pretrained, hub_kwargs(model_args, data_args), argument)
    if isinstance(config, JepaConfig):
        config = config.encoder_config
    return apply_config_overrides(config, model_args.config_overrides, is_default=name is None)


def apply_config_overrides(
    config: PreTrainedConfig, overrides: str | None, is_default: bool = False
) -> PreTrainedConfig:
    """Change a configuration by `name=value,name=value`, and derive the values that depend on the changes.

    With `is_default`, it has its class's defaults, so that other values (a Llama's `head_dim`) are derived anew.
    """
    if not overrides:
        return config
    parts = [part.partition("=") for part in overrides.split(",")]
    for name, equals, _ in parts:
        if not equals:
            raise UsageError(f"config_overrides {overrides!r} gives {name!r} no value. Write name=value,name=value.")
        if not hasattr(config, name):
            meant = suggestion(name, (*config.to_dict(), *config.attribute_map))
            raise UsageError(
                f"config_overrides {overrides!r}: the configuration of a {config.model_type} model has no {name!r}."
                f"{meant} Its names are those of {type(config).__name__}."
            )
    try:
        config.update_from_string(overrides)
        values = config.to_dict()
        if is_default:
            values = {config.attribute_map.get(name, name): getattr(config, name) for name, _, _ in parts}
        elif len(values.get("layer_types") or ()) != config.num_hidden_layers:
            values.pop("layer_types", None)  # ModernBERT's follow from the number of layers
        return type(config).from_dict(values)
    except (ValueError, IndexError, TypeError, StrictDataclassError) as error:
        raise UsageError(
            f"config_overrides {overrides!r} has a wrong value for a {config.model_type} model: {one_line(error)}"
        ) from None


def load_tokenizer(argument: str, name: str, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load a tokenizer without chat templates: encoders need none, and template names become file names."""
    tokenizer = load_or_usage_error(name, AutoTokenizer.from_pretrained, kwargs, argument)
    tokenizer.chat_template = None
    return tokenizer


def has_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether there are not only special tokens, as if transformers finds no tokenizer in a directory."""
    return len(tokenizer) > len(tokenizer.all_special_ids)


def resolve_max_seq_length(possible: float, tokenizer: PreTrainedTokenizerBase | None, requested: int | None) -> int:
    """Return the maximum tokens of a row: the requested length, or the model's and tokenizer's up to 512.

    Without a tokenizer, one is trained for this length.
    """
    if requested is None:
        return int(min(possible, 512, tokenizer.model_max_length if tokenizer is not None else 512))
    if requested > possible:
        raise UsageError(
            f"max_seq_length {requested} is more than the {possible} positions of the model; use at most {possible}"
        )
    return requested


def on_main_process(args: TrainingArguments, make: Callable[[], T]) -> T:
    """Make an object in the main process and broadcast it."""
    return broadcast_object_list([make() if args.process_index == 0 else None])[0]


def build_model(
    model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig
) -> JepaForRepresentationPrediction:
    """Build the JEPA around the pretrained encoder, or a random one, whose `config` may be that of the JEPA."""
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    if model_args.model_name_or_path is None:
        is_jepa = isinstance(config, JepaConfig)
        jepa_config = config if is_jepa else JepaConfig.for_encoder(config, **model_args.jepa_kwargs())
        try:
            with zero3_init_disabled():
                return JepaForRepresentationPrediction._from_config(jepa_config, **attention)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                f"the {jepa_config.encoder_config.model_type} encoder cannot be built with this configuration: {error}"
            ) from None
    model = load_or_usage_error(
        model_args.model_name_or_path,
        lambda name, **kwargs: JepaForRepresentationPrediction.from_any_pretrained(
            name, encoder_kwargs=kwargs, **model_args.jepa_kwargs()
        ),
        {**hub_kwargs(model_args, data_args), **attention},
        "model_name_or_path",
    )
    if model_args.passed_model is not None:
        model.config.name_or_path = model_args.passed_model
    return model
