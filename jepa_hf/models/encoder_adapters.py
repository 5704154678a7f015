"""Which adapter an encoder family has. docs/how-to/encoder-family.md adds one."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from .configuration_feature_encoder import FeatureEncoderConfig
from .encoder_adapter import EncoderAdapter
from .feature_adapter import FeatureEncoderAdapter
from .text_adapters import (
    FullLengthTextEncoderAdapter,
    ModernBertEncoderAdapter,
    RobertaEncoderAdapter,
    TextEncoderAdapter,
)
from .vision_adapter import VisionEncoderAdapter

TEXT_WITH_PADDING_OFFSET = ("roberta", "xlm-roberta", "camembert")

# The adapter of each `model_type`; other types get a `FullLengthTextEncoderAdapter`.
ENCODER_ADAPTERS: dict[str, Callable[[Any], EncoderAdapter]] = {
    **dict.fromkeys(("bert", "distilbert", "electra"), TextEncoderAdapter),
    **dict.fromkeys(TEXT_WITH_PADDING_OFFSET, RobertaEncoderAdapter),
    "modernbert": ModernBertEncoderAdapter,
    **dict.fromkeys(("vit", "ijepa", "dinov2", "dinov2_with_registers"), VisionEncoderAdapter),
    FeatureEncoderConfig.model_type: FeatureEncoderAdapter,
}


def encoder_adapter_for(config: PreTrainedConfig) -> EncoderAdapter:
    """Return the adapter of an encoder's configuration."""
    return ENCODER_ADAPTERS.get(config.model_type, FullLengthTextEncoderAdapter)(config)
