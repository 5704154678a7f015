"""The targets: normalized averages of the target encoder's top layers."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .batch import JepaBatch
from .configuration_jepa import JepaConfig
from .encoder_adapter import EncoderAdapter
from .losses import layer_norm_no_affine
from .packed_sequences import instance_normalize, mean_pool_by_document
from .positions import gather_positions


class Targets(NamedTuple):
    """What the predictions are compared with, without gradient.

    Args:
        vectors: `[B * M, T, D]`.
        sample_means: with `contrastive_weight`, a mean of each sample, `[B * S, D]`.
        encoded: the target encoder's output.
    """

    vectors: torch.Tensor
    sample_means: torch.Tensor | None
    encoded: Any


@torch.no_grad()
def encode_targets(
    config: JepaConfig, adapter: EncoderAdapter, encoder: PreTrainedModel, batch: JepaBatch, **flags: bool
) -> Targets:
    """Encode the clean view once with the target encoder, normalize and gather the targets.

    `flags` are those of `EncoderAdapter.encode`.
    """
    averages_layers = config.average_top_k_layers > 1
    if averages_layers:
        flags["output_hidden_states"] = True
    encoded = adapter.encode(encoder, batch.clean, **flags)
    layers = [encoded.last_hidden_state]
    if averages_layers:
        layers = list(encoded.hidden_states[-config.average_top_k_layers :])
    means = _sample_means(config, layers, batch) if config.contrastive_weight > 0 else None
    return Targets(_target_vectors(config, layers, batch), means, encoded)


def _target_vectors(config: JepaConfig, layers: list[torch.Tensor], batch: JepaBatch) -> torch.Tensor:
    """Compute norm(Σ_k norm(layer_k) / K) at the target positions, `[B * M, T, D]`.

    Instance normalization needs all positions and comes before the gather. Other normalizations
    come after it, so that only targets are normalized.
    """
    row_positions = batch.positions.reshape(len(batch.samples), batch.num_masks * batch.positions.shape[1])
    gather_last = config.target_norm == "instance"
    if not gather_last:
        layers = [gather_positions(layer, row_positions) for layer in layers]
    # Only the running sum and one layer are held in float32.
    vectors: Any = sum(_normalize(config.target_norm, layer.float(), batch) for layer in layers)
    if len(layers) > 1:
        vectors = _normalize(config.target_norm, vectors / len(layers), batch)
    if gather_last:
        vectors = gather_positions(vectors, row_positions)
    return vectors.reshape(*batch.positions.shape, vectors.shape[-1])


def _normalize(target_norm: str, states: torch.Tensor, batch: JepaBatch) -> torch.Tensor:
    """Apply `target_norm` to float32 states `[B, K, D]`; "instance" requires all positions."""
    if target_norm == "layer":
        return layer_norm_no_affine(states)
    if target_norm == "instance":
        return instance_normalize(states, batch.samples, batch.max_samples)
    return states


def _sample_means(config: JepaConfig, layers: list[torch.Tensor], batch: JepaBatch) -> torch.Tensor:
    """Average each sample's positions, normalize, and average over the layers: `[B * S, D]`.

    With `contrastive_predictor` "none", the mean of the last layer as it is.
    """
    if config.contrastive_predictor == "none":
        return mean_pool_by_document(layers[-1].float(), batch.samples, batch.max_samples).flatten(0, 1)
    means: Any = sum(
        layer_norm_no_affine(mean_pool_by_document(layer.float(), batch.samples, batch.max_samples)) for layer in layers
    )
    return (means / len(layers)).flatten(0, 1)
