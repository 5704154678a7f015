"""Floating-point operations of a JEPA's training step."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..models.predictors import TransformerPredictor

# Parameters of the predictor that are looked up and added instead of multiplied.
PREDICTOR_TABLES = ("predictor.mask_token", "predictor.position_embeddings")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters that take part in matrix products: no embedding tables, except for the decoder's.

    Args:
        encoder: Of one encoder.
        predictor: Of the predictor, without `targets_only`.
        targets_only: Of the last predictor layer's parts that compute target positions only.
        mlm_head: Of the masked-language-model head with its decoder.
    """

    encoder: int
    predictor: int
    targets_only: int
    mlm_head: int


def count_parameters(model: JepaForRepresentationPrediction) -> ParameterCounts:
    """Count the parameters of each part."""
    encoder = cast(nn.Module, model.target_encoder)
    tables = sum(module.weight.numel() for module in encoder.modules() if isinstance(module, nn.Embedding))
    mlm_head = targets_only = 0
    if model.mlm_head is not None:
        decoder = cast(nn.Embedding, model.get_input_embeddings())
        mlm_head = _size(cast(nn.Module, model.mlm_head)) + decoder.weight.numel()
    if isinstance(model.predictor, TransformerPredictor):
        last = cast(Any, model.predictor.layers[-1])
        targets_only = sum(_size(part) for part in (last.query, last.proj, last.norm2, last.fc1, last.fc2))
    parameters = cast(nn.Module, model.predictor).named_parameters(prefix="predictor")
    predictor = sum(value.numel() for name, value in parameters if not name.endswith(PREDICTOR_TABLES))
    return ParameterCounts(_size(encoder) - tables, predictor - targets_only, targets_only, mlm_head)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training_flops(
    model: JepaForRepresentationPrediction, counts: ParameterCounts, inputs: dict[str, torch.Tensor]
) -> int:
    """Estimate a micro-batch's FLOPs: per parameter and position 2 forward, 4 backward.

    The target encoder runs forward only, over the clean view. The context encoder reads its own view, the predictor its
    context and the targets. Attention scores are left out, as in `PreTrainedModel.floating_point_ops`.
    """
    samples, masks, targets = inputs["target_positions"].shape
    length = model.encoder_adapter.length(inputs)
    if model.config.masked_tokens == "mask_token":
        encoded = predictor_context = samples * masks * length
    else:
        contexts, columns = inputs["context_positions"].shape[1:]
        encoded, predictor_context = samples * contexts * columns, samples * masks * columns
    predicted = samples * masks * targets
    predictor_inputs = predicted if model.config.predictor_type == "mlp" else predictor_context + predicted
    return (
        2 * counts.encoder * samples * length
        + 6 * counts.encoder * encoded
        + 6 * counts.predictor * predictor_inputs
        + 6 * (counts.targets_only + counts.mlm_head) * predicted
    )
