"""From a command's arguments to what its objective prepares."""

from dataclasses import fields

from transformers import PreTrainedConfig

from ..errors import UsageError
from ..models.backbones import backbone_for
from ..models.configuration_feature_encoder import FeatureEncoderConfig
from ..training.run_directory import RunPlan
from .arguments import Parsed
from .encoder_loading import Prepared, load_encoder_config
from .prepare_features import prepare_features
from .prepare_images import prepare_images
from .prepare_text import prepare_text

# Objective for what an encoder reads.
_OBJECTIVES = {"text": "span", "images": "images", "features": "features"}

# Arguments that one objective alone reads; those of the masks are checked where they are read.
_OWN = {
    "span": (
        "tokenizer_name", "tokenizer_vocab_size", "add_tokens", "text_column_name", "max_seq_length",
        "stride", "line_by_line", "concat", "packed", "pad_to_multiple_of", "preprocessing_num_workers",
        "overwrite_cache",
    ),
    "images": ("image_processor_name", "image_column_name"),
    "features": ("feature_column_names", "label_column_name"),
}  # fmt: skip


def prepare(parsed: Parsed, plan: RunPlan) -> Prepared:
    """All that a run needs, checked; nothing is written.

    Raises:
        UsageError: bad input of any kind.
    """
    model_args = parsed[0]
    config = _encoder_config(parsed)
    modality = "features" if config is None else backbone_for(config).modality
    if model_args.objective not in (None, _OBJECTIVES[modality]):
        family = FeatureEncoderConfig.model_type if config is None else config.model_type
        raise UsageError(
            f"objective {model_args.objective!r} does not go with a {family} encoder, whose objective is "
            f"{_OBJECTIVES[modality]}"
        )
    _refuse_others(parsed, _OBJECTIVES[modality])
    if modality == "features":
        return prepare_features(parsed, config)
    if modality == "images":
        return prepare_images(parsed, config)
    return prepare_text(parsed, config, plan)


def _refuse_others(parsed: Parsed, objective: str) -> None:
    """Complain about an argument that was given and that only another objective reads."""
    model_args, data_args, _, _ = parsed
    given = {
        item.name
        for part in (model_args, data_args)
        for item in fields(part)
        if getattr(part, item.name) != item.default
    }
    for other, names in _OWN.items():
        for name in names if other != objective else ():
            if name in given:
                raise UsageError(f"{name} is for the objective {other} and this run's is {objective}: leave it out")


def _encoder_config(parsed: Parsed) -> PreTrainedConfig | None:
    """The encoder's configuration; None where it takes its width from features that are not read yet."""
    model_args, data_args, _, _ = parsed
    if model_args.model_type == FeatureEncoderConfig.model_type:
        return None
    return load_encoder_config(model_args, data_args)
