"""Checks of a JEPA's configuration: names, types, ranges, combinations with the encoder."""

import math
from collections.abc import Mapping
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
_POSITIVE = ("pred_mlp_ratio", "smooth_l1_beta", "contrastive_temperature")
_FLOATS = (*WEIGHTS, *_POSITIVE, "pred_dropout", "initializer_range")
_INTEGERS = ("average_top_k_layers", "pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads")
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
    settings = vars(config)
    check_settings({name: settings[name] for name in (*_CHOICES, *_INTEGERS, *_FLOATS, "pool_targets")})
    _check_combinations(config, adapter)
    _check_sizes(config, adapter)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the types and ranges of arguments of `JepaConfig` that depend on nothing else.

    Args:
        settings: some of the arguments, by name.

    Raises:
        UsageError: a value of another type, or out of range.
    """
    for name, value in settings.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(f"{name} must be one of {', '.join(_CHOICES[name])}, not {value!r}.")
        if name in _INTEGERS and not isinstance(value, int):
            raise UsageError(f"{name} must be an integer, not {value!r:.80}.")
        if name in _INTEGERS and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
        if name in _FLOATS and (not isinstance(value, Real) or not math.isfinite(value)):
            raise UsageError(f"{name} must be a finite number, not {value!r:.80}.")
        if name in WEIGHTS and value < 0:
            raise UsageError(f"{name} must be at least 0, not {value}.")
        if name in _POSITIVE and value <= 0:
            raise UsageError(f"{name} must be above 0, not {value}.")
        if name == "pred_dropout" and not 0.0 <= value < 1.0:
            raise UsageError(f"pred_dropout must be in [0, 1), not {value}.")
        if name == "pool_targets" and not isinstance(value, bool):
            raise UsageError(f"pool_targets must be true or false, not {value!r:.80}.")


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


def _check_sizes(config: Any, adapter: EncoderAdapter) -> None:
    """Check sizes that depend on the encoder or on each other, and that something is trained."""
    depth, width, heads = (
        config.encoder_config.num_hidden_layers,
        config.pred_hidden_size,
        config.pred_num_attention_heads,
    )
    if config.average_top_k_layers > depth:
        raise UsageError(
            f"average_top_k_layers must be between 1 and the encoder's {depth} layers, not "
            f"{config.average_top_k_layers}."
        )
    if config.lora is not None:
        lora_config(config.lora)
    if width % heads:
        raise UsageError(f"pred_hidden_size {width} is not a multiple of pred_num_attention_heads {heads}.")
    if not any(getattr(config, name) for name in WEIGHTS):
        raise UsageError(f"All weights are 0, so nothing is trained. Set one of {', '.join(WEIGHTS)} above 0.")
    if len(adapter.grid) == 2 and width % 4:
        raise UsageError(f"pred_hidden_size must be a multiple of 4 for a grid of patches, not {width}.")
