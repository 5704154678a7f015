"""Averages of trained weights with those of the pretrained start."""

import torch
from transformers import AutoConfig

from ..errors import UsageError
from ..models.encoders import encoder_and_loading_info, is_pooler_parameter
from ..models.lora import scale_lora
from ..models.modeling_jepa import JepaForRepresentationPrediction
from .loading import load_or_usage_error


@torch.no_grad()
def average_with_start(
    model: JepaForRepresentationPrediction, which: str, share: float, start: str | None = None
) -> None:
    """Replace an encoder's weights by share · start + (1 − share) · trained, in place.

    Such an average keeps most of what was learned and forgets less of what the start could do
    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", equation 1).

    Args:
        model: the trained model.
        which: "context" or "target".
        share: share of the start, 0 to 1.
        start: directory or Hub name of the encoder that the run started from. Not needed with
            `lora`, whose frozen weights are the start: the adapters are scaled by 1 − share.

    Raises:
        UsageError: a share out of range; a start that is missing, cannot be loaded, or has other
            weights than the model.
    """
    check_share(share)
    encoder = model.get_encoder(which)
    if model.config.lora is not None:
        scale_lora(encoder, model.config.lora, 1.0 - share)
        return
    if start is None:
        raise UsageError("average needs the encoder that the run started from. Name it with --start.")
    weights = load_or_usage_error(start, _load_weights, {}, "start")
    trained = {name: value for name, value in encoder.named_parameters() if not is_pooler_parameter(name)}
    for name, parameter in trained.items():
        if name not in weights or weights[name].shape != parameter.shape:
            shape = "it is missing" if name not in weights else f"its shape is {tuple(weights[name].shape)}"
            raise UsageError(
                f"start {start!r} is not the encoder that the run started from: {name} is {tuple(parameter.shape)} in "
                f"the trained encoder, but {shape} in the start."
            )
    for name, parameter in trained.items():
        parameter.lerp_(weights[name].to(parameter), share)


def check_share(share: float) -> None:
    """Raise a `UsageError` for a share of the start that is not between 0 and 1."""
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"average must be between 0 (the trained weights) and 1 (the start), not {share:g}.")


def _load_weights(name_or_path: str) -> dict[str, torch.Tensor]:
    """Load an encoder's float32 weights by name, without those that its checkpoint lacks."""
    config = AutoConfig.from_pretrained(name_or_path)
    encoder, info = encoder_and_loading_info(name_or_path, config, dtype=torch.float32)
    return {name: value for name, value in encoder.named_parameters() if name not in info["missing_keys"]}
