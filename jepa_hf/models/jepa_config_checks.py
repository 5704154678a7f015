"""Checks of a JEPA's configuration: names, types, ranges, combinations with the encoder."""

import math
from numbers import Real
from typing import Any

from .encoder_adapter import EncoderAdapter
from .errors import UsageError
from .lora import lora_config

# Weights of the terms of the loss.
WEIGHTS = (
    "prediction_weight",
    "mlm_weight",
    "variance_weight",
    "covariance_weight",
    "sigreg_weight",
    "contrastive_weight",
)
_FLOAT_FIELDS = (
    *WEIGHTS,
    "pred_mlp_ratio",
    "pred_dropout",
    "smooth_l1_beta",
    "contrastive_temperature",
    "initializer_range",
)
_PREDICTOR_SIZES = ("pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads")
_CHOICES = {
    "masked_tokens": ("mask_token", "drop"),
    "predictor_type": ("transformer", "mlp"),
    "loss": ("smooth_l1", "l2", "l1", "cosine"),
    "target_norm": ("layer", "instance", "none"),
    "pred_init": ("unit_gain", "small"),
    "contrastive_predictor": ("mlp", "none"),
}


def validate_jepa_config(config: Any, adapter: EncoderAdapter) -> None:
    """Check a `JepaConfig`, whose encoder has this adapter.

    Raises:
        UsageError: values contradict each other or the encoder.
    """
    _check_types(config)
    _check_combinations(config, adapter)
    _check_ranges(config, adapter)


def _check_types(config: Any) -> None:
    """Check names and types."""
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}.")
    for name in ("average_top_k_layers", *_PREDICTOR_SIZES):
        if not isinstance(getattr(config, name), int):
            raise UsageError(f"{name} must be an integer, not {getattr(config, name)!r:.80}.")
    for name in _FLOAT_FIELDS:
        value = getattr(config, name)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number, not {value!r:.80}.")
    if not isinstance(config.pool_targets, bool):
        raise UsageError(f"pool_targets must be true or false, not {config.pool_targets!r:.80}.")


def _check_combinations(config: Any, adapter: EncoderAdapter) -> None:
    """Check that the settings fit the encoder and each other."""
    family = config.encoder_config.model_type
    if config.masked_tokens == "mask_token" and "mask_token" not in adapter.masked_tokens_options:
        raise UsageError(
            f"masked_tokens 'mask_token' is not supported for {family} encoders, which have no [MASK] token. Use "
            "--masked_tokens drop."
        )
    if config.masked_tokens == "drop" and "drop" not in adapter.masked_tokens_options:
        reason = "depends on every position" if adapter.grid else "has one position only"
        raise UsageError(
            f"masked_tokens 'drop' is not exact for {family} encoders, whose attention {reason}. Use "
            "--masked_tokens mask_token."
        )
    if config.masked_tokens == "drop" and config.predictor_type == "mlp":
        raise UsageError(
            "The mlp predictor reads the [MASK] positions, which masked_tokens 'drop' removes. Use "
            "--predictor_type transformer or --masked_tokens mask_token."
        )
    if config.target_norm == "instance" and not adapter.grid:
        raise UsageError(
            "target_norm instance normalizes over a sample's positions, and this encoder has one only. Use layer "
            "or none."
        )
    if config.pool_targets and config.mlm_weight > 0:
        raise UsageError(
            "pool_targets has one target per mask, but mlm_weight needs one per token. Use only one of them."
        )


def _check_ranges(config: Any, adapter: EncoderAdapter) -> None:
    """Check numbers."""
    depth, width, heads = (
        config.encoder_config.num_hidden_layers,
        config.pred_hidden_size,
        config.pred_num_attention_heads,
    )
    if not 1 <= config.average_top_k_layers <= depth:
        raise UsageError(
            f"average_top_k_layers must be between 1 and the encoder's {depth} layers, not "
            f"{config.average_top_k_layers}."
        )
    for name in _PREDICTOR_SIZES:
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, not {getattr(config, name)}.")
    if config.lora is not None:
        lora_config(config.lora)
    if not 0.0 <= config.pred_dropout < 1.0:
        raise UsageError(f"pred_dropout must be in [0, 1), not {config.pred_dropout}.")
    if width % heads:
        raise UsageError(f"pred_hidden_size {width} is not a multiple of pred_num_attention_heads {heads}.")
    for name in ("pred_mlp_ratio", "smooth_l1_beta", "contrastive_temperature"):
        if getattr(config, name) <= 0:
            raise UsageError(f"{name} must be above 0, not {getattr(config, name)}.")
    for name in WEIGHTS:
        if getattr(config, name) < 0:
            raise UsageError(f"{name} must be at least 0, not {getattr(config, name)}.")
    if not any(getattr(config, name) for name in WEIGHTS):
        raise UsageError(f"All weights are 0, so nothing is trained. Set one of {', '.join(WEIGHTS)} above 0.")
    if len(adapter.grid) == 2 and width % 4:
        raise UsageError(f"pred_hidden_size must be a multiple of 4 for a grid of patches, not {width}.")
