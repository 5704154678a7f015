"""Logged metrics of a JEPA's batches, their names, and the loss of an evaluation."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models.configuration_jepa import JepaConfig
from ..models.jepa_config_checks import WEIGHTS
from ..models.packed_sequences import document_counts, gather_document_ids
from ..monitoring.health_sample import metric_names
from .metric_accumulator import MetricAccumulator

# Per-target metrics that the model may return.
_BATCH_METRICS = ("prediction_loss", "mlm_loss", "variance_loss", "covariance_loss", "sigreg_loss", "cosine")


def count_targets(inputs: dict[str, torch.Tensor], pool_targets: bool) -> torch.Tensor:
    """Count the targets of a micro-batch, a scalar; with `pool_targets` masks that have any."""
    valid = inputs["target_valid"]
    if not pool_targets:
        return valid.sum()
    if "document_ids" not in inputs:
        return valid.any(dim=-1).sum()
    positions = inputs["target_positions"].flatten(0, 1)
    documents = gather_document_ids(inputs["document_ids"], positions, valid.flatten(0, 1))
    return (document_counts(documents, inputs["document_valid"].shape[1]) > 0).sum()


def add_batch_metrics(
    means: MetricAccumulator, outputs: Any, inputs: dict[str, torch.Tensor], tokens: torch.Tensor | None
) -> torch.Tensor:
    """Add the parts of the loss, the masked fraction and the number of rows without targets.

    `tokens` is None for vectors that are one token: a part of it is masked, which cannot be counted.

    Returns:
        Number of samples with targets, a scalar.
    """
    valid = outputs.target_valid
    for name in _BATCH_METRICS:
        value = getattr(outputs, name)
        if value is not None:
            means.add(name, value, outputs.num_targets)
    if tokens is not None:
        positions = tokens * valid.shape[1]
        means.add("masked_fraction", inputs["target_valid"].sum() / positions, positions)
    if "document_valid" in inputs:  # of packed rows, documents
        exists = inputs["document_valid"]
        has_targets = document_counts(outputs.target_samples.flatten(1), exists.shape[1]) > 0
    else:
        has_targets = valid.flatten(1).any(dim=1)
        exists = torch.ones_like(has_targets)
    means.count("rows_without_targets", (exists & ~has_targets).sum())
    return (exists & has_targets).sum()


def evaluation_metrics(config: JepaConfig) -> set[str]:
    """Return the names of the metrics of an evaluation, without `eval_`."""
    names = {"loss", "prediction_loss", "cosine", "masked_fraction", "rows_without_targets"}
    return names.union(_parts(config).values(), metric_names(config))


def weighted_loss(config: JepaConfig, metrics: Mapping[str, float], prefix: str) -> float:
    """Return the weighted sum of the parts of the loss that an evaluation measured."""
    return sum(getattr(config, weight) * metrics[f"{prefix}_{part}"] for weight, part in _parts(config).items())


def _parts(config: JepaConfig) -> dict[str, str]:
    """Name the part of the loss of each weight that is not 0."""
    return {name: name.replace("weight", "loss") for name in WEIGHTS if getattr(config, name)}
