"""The weighted terms of the JEPA loss. Each sets its unweighted value in the output."""

from typing import cast

import torch
import torch.nn.functional as F

from .configuration_jepa import JepaConfig
from .contrastive import contrastive_sum
from .losses import covariance_loss, fixed_directions, masked_sum, prediction_loss, sigreg, variance_loss
from .mlm_head import masked_lm_sum
from .outputs import JepaOutput, Predicted


def prediction_term(
    config: JepaConfig, output: JepaOutput, predicted: Predicted, total: torch.Tensor | int
) -> torch.Tensor:
    """Return w · Σ_t ℓ(prediction_t, target_t) / total."""
    predictions, targets, valid, _, num_targets = predicted
    errors = prediction_loss(config.loss, predictions, targets, config.smooth_l1_beta)
    error_sum = masked_sum(errors, valid)
    output.prediction_loss = error_sum / num_targets.clamp_min(1)
    # In the model, because torch.compile fuses it with the loss.
    cosines = F.cosine_similarity(predictions.detach().float(), targets.float(), dim=-1)
    output.cosine = masked_sum(cosines, valid) / num_targets.clamp_min(1)
    return config.prediction_weight * error_sum / total


def mlm_term(
    config: JepaConfig,
    output: JepaOutput,
    predicted: Predicted,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    total: torch.Tensor | int,
) -> torch.Tensor:
    """Return w · Σ_t −log softmax(logits_t)[token_t] / total, logits `[N, T, V]`."""
    mlm_sum = masked_lm_sum(logits, tokens, predicted.valid)
    output.mlm_loss = mlm_sum / predicted.num_targets.clamp_min(1)
    return config.mlm_weight * mlm_sum / total


def add_statistics(
    config: JepaConfig,
    output: JepaOutput,
    loss: torch.Tensor,
    states: torch.Tensor,
    counted: torch.Tensor,
    num_samples: torch.Tensor,
    share: torch.Tensor,
    training: bool,
) -> torch.Tensor:
    """Return loss + w · share · statistic for each statistic of the context encoder's outputs.

    Args:
        config: has the weights.
        output: receives the statistics.
        loss: the other terms.
        states: `[B * views, C, D]`.
        counted: bool `[B * views, C]`, the vectors to include.
        num_samples: scalar, number of samples they belong to.
        share: this micro-batch's share of the update's targets.
        training: with random directions for SIGReg; else they are fixed.
    """
    if config.variance_weight > 0:
        output.variance_loss = variance = variance_loss(states, counted)
        loss = loss + config.variance_weight * share * variance
    if config.covariance_weight > 0:
        output.covariance_loss = covariance = covariance_loss(states, counted)
        loss = loss + config.covariance_weight * share * covariance
    if config.sigreg_weight > 0:
        directions = None if training else fixed_directions(states.shape[-1], states.device)
        output.sigreg_loss = distance = sigreg(states, counted, num_samples, directions)
        loss = loss + config.sigreg_weight * share * distance
    return loss


def contrastive_term(
    config: JepaConfig,
    output: JepaOutput,
    num_targets: torch.Tensor,
    counts: torch.Tensor,
    has_targets: torch.Tensor,
    packed: bool,
    total: torch.Tensor | int,
) -> torch.Tensor:
    """Return w · Σ_v count_v · InfoNCE_v / total over the views v.

    Args:
        config: has weight and temperature.
        output: has the sample predictions and targets, receives the unweighted term.
        num_targets: scalar, number of valid targets.
        counts: targets of each sample in each view, long `[B, views, S]`.
        has_targets: bool `[B, S]`.
        packed: whether ranks may have different numbers of samples.
        total: number of targets of the update.
    """
    contrastive = contrastive_sum(
        cast("torch.Tensor", output.sample_predictions),
        cast("torch.Tensor", output.sample_targets),
        counts.transpose(1, 2).flatten(),
        has_targets.flatten(),
        config.contrastive_temperature,
        same_size=not packed,
    )
    output.contrastive_loss = contrastive / num_targets.clamp_min(1)
    return config.contrastive_weight * contrastive / total
