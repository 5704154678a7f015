"""Choice of the objective that prepares a run."""

from dataclasses import fields

from ..errors import UsageError
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from ..models.encoder_adapters import encoder_adapter_for
from ..training.run_directory import RunPlan
from .arguments import Parsed
from .encoder_loading import TrainingComponents, load_encoder_config
from .prepare_features import prepare_features
from .prepare_images import prepare_images
from .prepare_text import prepare_text

# Modality of the encoder to objective.
_OBJECTIVES = {"text": "span", "images": "images", "features": "features"}

# Arguments of one objective only; mask arguments are checked where they are used.
_OBJECTIVE_ARGUMENTS = {
    "span": (
        "tokenizer_name", "tokenizer_vocab_size", "add_tokens", "resize_token_embeddings", "text_column_name",
        "max_seq_length", "stride", "line_by_line", "concat", "packed", "pad_to_multiple_of",
        "preprocessing_num_workers", "overwrite_cache",
    ),
    "images": ("image_processor_name", "image_column_name"),
    "features": ("feature_column_names", "label_column_name"),
}  # fmt: skip


def prepare(parsed: Parsed, plan: RunPlan) -> TrainingComponents:
    """Load and check everything that a run needs; nothing is written."""
    model_args, data_args, _, _ = parsed
    # The width of a random feature encoder depends on features that are not read yet.
    is_random_feature_encoder = model_args.model_type == FeatureEncoderConfig.model_type
    config = None if is_random_feature_encoder else load_encoder_config(model_args, data_args)
    modality = "features" if config is None else encoder_adapter_for(config).modality
    if model_args.objective not in (None, _OBJECTIVES[modality]):
        family = FeatureEncoderConfig.model_type if config is None else config.model_type
        raise UsageError(
            f"objective {model_args.objective!r} does not go with a {family} encoder, whose objective is "
            f"{_OBJECTIVES[modality]}"
        )
    _reject_foreign_arguments(parsed, _OBJECTIVES[modality])
    if config is None or modality == "features":
        return prepare_features(parsed, config)
    if modality == "images":
        return prepare_images(parsed, config)
    return prepare_text(parsed, config, plan)


def _reject_foreign_arguments(parsed: Parsed, objective: str) -> None:
    """Reject arguments of another objective."""
    model_args, data_args, _, _ = parsed
    set_by_user = {
        item.name
        for part in (model_args, data_args)
        for item in fields(part)
        if getattr(part, item.name) != item.default
    }
    for other, names in _OBJECTIVE_ARGUMENTS.items():
        for name in names if other != objective else ():
            if name in set_by_user:
                raise UsageError(f"{name} is for the objective {other}, and this run's is {objective}; omit it")
