"""Metrics of the views."""

from typing import Any, cast

import torch
import torch.nn.functional as F

from ..monitoring.metrics import effective_rank, mean_pairwise_cosine, top1_accuracy
from ..training.metric_accumulator import MetricAccumulator

# Maximum number of rows for the metrics of an evaluation.
_MAX_EVAL_VECTORS = 1024


class ViewMetrics:
    """Means over the pairs of batches, and what only many pairs together show."""

    def __init__(self) -> None:
        self.embeddings: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, outputs: Any, row_valid: torch.Tensor | None, means: MetricAccumulator, is_evaluation: bool
    ) -> None:
        """Add one micro-batch to `means`; the vectors of an evaluation are kept up to a maximum."""
        if outputs.predictions is None:
            return
        predictions, targets = outputs.predictions.detach().float(), outputs.targets.detach().float()
        weights = predictions.new_ones(len(predictions)) if row_valid is None else row_valid.float()
        weights = weights / weights.sum().clamp_min(1)
        cosines = F.cosine_similarity(predictions, targets, dim=-1)
        means.add("pair_loss", cast(torch.Tensor, outputs.pair_loss), outputs.num_pairs)
        means.add("view_cosine", (cosines * weights).sum(), outputs.num_pairs)
        means.add("view_norm", (targets.norm(dim=-1) * weights).sum(), outputs.num_pairs)
        if not is_evaluation:
            if len(targets) > 1 and row_valid is None:
                means.add("view_pairwise_cosine", mean_pairwise_cosine(targets), outputs.num_pairs)
        elif sum(len(views) for views, _ in self.embeddings) < _MAX_EVAL_VECTORS:
            self.embeddings.append((predictions, targets))

    def finish(self, means: MetricAccumulator) -> None:
        """Add the metrics that show a collapse. No single one is sufficient, nor is the distance.

        `view_rank` detects second views in few dimensions, `view_pairwise_cosine` those in one
        direction. `view_top1_accuracy` is the top-1 accuracy of retrieving a row's second view by its
        first, among the rows of this rank. The second views' mean is subtracted from both.
        """
        embeddings, self.embeddings = self.embeddings, []
        if sum(len(targets) for _, targets in embeddings) > 1:
            predictions, targets = (torch.cat(views)[:_MAX_EVAL_VECTORS] for views in zip(*embeddings, strict=True))
            one = targets.new_ones(())
            means.add("view_rank", effective_rank(targets), one)
            means.add("view_pairwise_cosine", mean_pairwise_cosine(targets), one)
            means.add("view_top1_accuracy", top1_accuracy(predictions, targets), one)
            means.add("view_top1_accuracy_chance", one / len(targets), one)
