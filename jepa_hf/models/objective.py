"""The JEPA objective: the weighted sum of the losses in `losses.py`, `contrastive.py` and `mlm_head.py`."""

import torch
import torch.nn.functional as F

from .batch import JepaBatch
from .configuration_jepa import JepaConfig
from .context_view import ContextView
from .contrastive import contrastive_sum
from .losses import covariance_loss, fixed_directions, masked_sum, prediction_loss, sigreg, variance_loss
from .mlm_head import masked_lm_sum
from .outputs import Predicted, SampleVectors
from .packed_sequences import document_counts
from .positions import repeat_interleave_samples


def jepa_loss(
    config: JepaConfig,
    batch: JepaBatch,
    view: ContextView,
    predicted: Predicted,
    sample_vectors: SampleVectors | None,
    mlm_logits: torch.Tensor | None,
    total: torch.Tensor | int | None,
    training: bool,
) -> dict[str, torch.Tensor]:
    """Compute the loss and its unweighted terms.

    loss = Σ_k w_k · sum_k / total + Σ_j w_j · (n / total) · statistic_j, with sums over the n targets of this
    micro-batch and `total` targets in the optimizer update. The shares n / total of the micro-batches add up to 1.

    `sample_vectors` are given with `contrastive_weight`, `mlm_logits` `[B * M, T, V]` with `mlm_weight`. By default
    `total` is the number of targets of this batch. In training SIGReg has random directions, else fixed ones.

    Returns:
        Fields of `JepaOutput`: "loss", "cosine", and the loss of each term with a weight.
    """
    num_targets = predicted.num_targets.clamp_min(1)
    total = num_targets if total is None else total
    counts = _targets_per_view(batch, view, predicted)
    # Padding rows and samples that are too short have no targets.
    has_targets = counts.sum(dim=1) > 0

    prediction_sum = _prediction_sum(config, predicted)
    terms = {"prediction_loss": prediction_sum / num_targets, "cosine": _cosine_sum(predicted) / num_targets}
    loss = config.prediction_weight * prediction_sum / total
    if mlm_logits is not None:
        mlm_sum = masked_lm_sum(mlm_logits, _target_tokens(batch), predicted.valid)
        terms["mlm_loss"] = mlm_sum / num_targets
        loss = loss + config.mlm_weight * mlm_sum / total
    for name, statistic in _context_statistics(config, view, has_targets, training).items():
        terms[f"{name}_loss"] = statistic
        loss = loss + getattr(config, f"{name}_weight") * (predicted.num_targets / total) * statistic
    if sample_vectors is not None:
        infonce_sum = contrastive_sum(
            sample_vectors.predictions,
            sample_vectors.targets,
            counts.transpose(1, 2).flatten(),
            has_targets.flatten(),
            config.contrastive_temperature,
            standardize=config.contrastive_predictor == "mlp",
            same_size=batch.document_ids is None,
        )
        terms["contrastive_loss"] = infonce_sum / num_targets
        loss = loss + config.contrastive_weight * infonce_sum / total
    return {"loss": loss, **terms}


def _prediction_sum(config: JepaConfig, predicted: Predicted) -> torch.Tensor:
    """Return Σ_t ℓ(prediction_t, target_t)."""
    errors = prediction_loss(config.loss, predicted.predictions, predicted.targets, config.smooth_l1_beta)
    return masked_sum(errors, predicted.valid)


def _cosine_sum(predicted: Predicted) -> torch.Tensor:
    """Return Σ_t cos(prediction_t, target_t). Here, because torch.compile fuses it with the loss."""
    predictions = predicted.predictions.detach().float()
    return masked_sum(F.cosine_similarity(predictions, predicted.targets.float(), dim=-1), predicted.valid)


def _target_tokens(batch: JepaBatch) -> torch.Tensor:
    """Return the clean tokens at the target positions, long `[B * M, T]`."""
    return repeat_interleave_samples(batch.clean["input_ids"], batch.num_masks).gather(1, batch.positions)


def _context_statistics(
    config: JepaConfig, view: ContextView, has_targets: torch.Tensor, training: bool
) -> dict[str, torch.Tensor]:
    """Compute the statistics of the context encoder's outputs that have a weight, by name.

    Samples without targets do not count; `has_targets` is bool `[B, S]`.
    """
    if not (config.variance_weight > 0 or config.covariance_weight > 0 or config.sigreg_weight > 0):
        return {}
    of_view = repeat_interleave_samples(has_targets, view.num_views)
    counted = of_view.gather(1, view.samples.clamp_min(0)) & view.valid
    states = view.encoded.last_hidden_state
    statistics = {}
    if config.variance_weight > 0:
        statistics["variance"] = variance_loss(states, counted)
    if config.covariance_weight > 0:
        statistics["covariance"] = covariance_loss(states, counted)
    if config.sigreg_weight > 0:
        directions = None if training else fixed_directions(states.shape[-1], states.device)
        statistics["sigreg"] = sigreg(states, counted, has_targets.sum(), directions)
    return statistics


def _targets_per_view(batch: JepaBatch, view: ContextView, predicted: Predicted) -> torch.Tensor:
    """Count the targets of each sample in each view, long `[B, views, S]`."""
    counts = document_counts(predicted.samples, batch.max_samples)
    return counts.unflatten(0, (-1, view.num_views, batch.num_masks // view.num_views)).sum(dim=2)
