"""The model's output, and the predictions and targets that the loss terms compare."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


@dataclass
class JepaOutput(ModelOutput):
    """Output of `JepaForRepresentationPrediction`.

    B rows, M masks each, T targets per mask (one per sample with `pool_targets`), width D. A row
    is a sample, or has up to S samples if rows are packed.

    Args:
        loss: scalar, the weighted sum of the terms.
        prediction_loss: scalar, mean over the targets.
        mlm_loss, variance_loss, covariance_loss, sigreg_loss, contrastive_loss: scalars,
            unweighted; None if the weight is 0.
        cosine: scalar, mean cosine similarity of predictions and targets, without gradient.
        num_targets: scalar, number of valid targets.
        predictions: `[B, M, T, D]`.
        targets: `[B, M, T, D]`, normalized.
        target_valid: bool `[B, M, T]`.
        target_samples: long `[B, M, T]`, index of the target's sample in its row; 0 if rows are not
            packed, -1 where not valid.
        sample_predictions: with `contrastive_weight`, predictions from the mean of each view, `[B * S * views, D]`.
        sample_targets: with `contrastive_weight`, mean of each sample over the target layers, `[B * S, D]`.
        context_state: the context encoder's last layer, `[B * M, C, D]`, in eval mode or on request.
        context_valid: bool `[B * M, C]`, False on padding, in eval mode or on request.
        context_samples: long `[B * M, C]`, like `target_samples`, in eval mode or on request.
        context_hidden_states: all layers of the context encoder, on request.
        target_hidden_states: all layers of the target encoder, `[B, L, D]` each, on request.
        context_attentions, target_attentions: attention weights of each layer, `[B * M, heads, C, C]`
            and `[B, heads, L, L]`, on request.
    """

    loss: torch.Tensor | None = None
    prediction_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    variance_loss: torch.Tensor | None = None
    covariance_loss: torch.Tensor | None = None
    sigreg_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    cosine: torch.Tensor | None = None
    num_targets: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    target_valid: torch.Tensor | None = None
    target_samples: torch.Tensor | None = None
    sample_predictions: torch.Tensor | None = None
    sample_targets: torch.Tensor | None = None
    context_state: torch.Tensor | None = None
    context_valid: torch.Tensor | None = None
    context_samples: torch.Tensor | None = None
    context_hidden_states: tuple[torch.Tensor, ...] | None = None
    target_hidden_states: tuple[torch.Tensor, ...] | None = None
    context_attentions: tuple[torch.Tensor, ...] | None = None
    target_attentions: tuple[torch.Tensor, ...] | None = None


class Predicted(NamedTuple):
    """Predictions and targets of a batch, N = B × M.

    Args:
        predictions: `[N, T, D]`.
        targets: `[N, T, D]`.
        valid: bool `[N, T]`.
        samples: long `[N, T]`, index of the target's sample in its row, -1 where not valid.
        num_targets: scalar, number of valid targets.
    """

    predictions: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    samples: torch.Tensor
    num_targets: torch.Tensor


class SampleVectors(NamedTuple):
    """Predictions and targets of samples, for the contrastive term.

    Args:
        predictions: from the mean of each view, `[B * S * views, D]`.
        targets: mean of each sample over the target layers, `[B * S, D]`.
    """

    predictions: torch.Tensor
    targets: torch.Tensor
