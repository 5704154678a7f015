"""InfoNCE with candidates from all ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed

from .losses import all_reduced, standardize_features, without_autocast


def infonce(
    prediction: torch.Tensor,
    candidates: torch.Tensor,
    positive_index: torch.Tensor,
    temperature: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute −log softmax(cos(prediction, candidates) / temperature) at each prediction's target.

    Van den Oord et al. 2018, equation 4, in float32. A statistic of the batch: it changes with the
    number of candidates.

    Args:
        prediction: `[N, D]`.
        candidates: `[C, D]`, the targets of all ranks.
        positive_index: long `[N]`, index of each prediction's target among the candidates.
        temperature: divisor of the cosines (official code: 0.07).
        valid: bool `[C]`, False for padding; default all True.

    Returns:
        `[N]`, at least 0; undefined for a prediction whose target is not valid.
    """
    if valid is not None:  # 0 × NaN would be NaN in the gradient
        candidates = torch.where(valid[:, None], candidates, 0.0)
    with without_autocast(prediction):
        prediction, candidates = (F.normalize(vectors.float(), dim=-1) for vectors in (prediction, candidates))
        logits = prediction @ candidates.T / temperature
        if valid is not None:
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, positive_index, reduction="none")


def contrastive_sum(
    predictions: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    has_targets: torch.Tensor,
    temperature: float,
    standardize: bool,
    same_size: bool,
) -> torch.Tensor:
    """Sum count · InfoNCE over the views, with the targets of all ranks as candidates.

    Args:
        predictions: `[N * views, D]`, the views of a sample next to each other.
        targets: `[N, D]`, one per sample.
        counts: long `[N * views]`, targets of each view. With these weights, micro-batches and
            ranks add up to the loss of the full batch.
        has_targets: bool `[N]`; samples without targets are not candidates.
        temperature: divisor of the cosines.
        standardize: whether each feature of the candidates gets mean 0 and variance 1 over them.
        same_size: False if N may differ between ranks.

    Returns:
        Scalar.
    """
    flagged = torch.cat([targets, has_targets[:, None].to(targets.dtype)], dim=1)
    flagged, own = all_gather_candidates(flagged, same_size)
    candidates, valid = flagged[:, :-1], flagged[:, -1] > 0
    own = own.repeat_interleave(len(predictions) // len(own))
    if standardize:
        candidates = standardize_features(candidates, valid)
    losses = infonce(predictions, candidates, own, temperature, valid)
    losses = torch.where(counts > 0, losses, torch.zeros_like(losses))
    return (losses * counts).sum()


def all_gather_candidates(vectors: torch.Tensor, same_size: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """All-gather the candidates of `infonce`, with gradients, and locate this rank's own.

    Training batches have one size on all ranks. The last batch of an evaluation may not: without
    gradients the sizes are exchanged first, which synchronizes with the device.

    Args:
        vectors: `[N, D]`.
        same_size: False if N may differ between ranks in training too.

    Returns:
        Candidates `[sum of N, D]`, and the indices of this rank's vectors among them, long `[N]`.
    """
    own = torch.arange(len(vectors), device=vectors.device)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return vectors, own
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    if same_size and torch.is_grad_enabled():
        return _AllGatherWithGrad.apply(vectors), own + rank * len(vectors)
    counts = torch.zeros(ranks, dtype=torch.long, device=vectors.device)
    counts[rank] = len(vectors)
    distributed.all_reduce(counts)
    sizes = counts.tolist()
    parts = _AllGatherWithGrad.apply(F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))).chunk(ranks)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), own + sum(sizes[:rank])


class _AllGatherWithGrad(torch.autograd.Function):
    """All-gather in rank order; the gradient is all-reduced, and each rank takes its own part.

    Unlike `torch.distributed.nn.functional.all_gather`, torch.compile traces it.
    """

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor) -> torch.Tensor:
        gathered = vectors.new_empty(distributed.get_world_size() * len(vectors), *vectors.shape[1:])
        distributed.all_gather_into_tensor(gathered, vectors.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduced(gradient).chunk(distributed.get_world_size())[distributed.get_rank()]
