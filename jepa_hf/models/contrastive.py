"""InfoNCE, with the candidates of all ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed

from .losses import all_reduced, without_autocast


def infonce(
    prediction: torch.Tensor,
    candidates: torch.Tensor,
    own: torch.Tensor,
    temperature: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of finding each prediction's target among all candidates by cosine (van den Oord et al. 2018).

    Computed in float32. A statistic of the batch: it changes with the number of candidates.

    Args:
        prediction: `[N, D]`.
        candidates: `[C, D]`, the targets of all ranks.
        own: long `[N]`, which candidate is each prediction's target.
        temperature: what the cosines are divided by (official code: 0.07).
        valid: bool `[C]`, False for candidates that are only filled up; default all are.

    Returns:
        `[N]`, at least 0; of a prediction whose own target is none it means nothing.
    """
    with without_autocast(prediction):
        prediction, candidates = (F.normalize(vectors.float(), dim=-1) for vectors in (prediction, candidates))
        logits = prediction @ candidates.T / temperature
        if valid is not None:
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, own, reduction="none")


def candidates_of_all_ranks(vectors: torch.Tensor, same_size: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What `infonce` compares with: the vectors of all ranks, with their gradients, and which are one's own.

    Batches that are trained on are of one size. The last one of an evaluation may not be: there the ranks tell each
    other, for which they wait for their devices. (A rank that has no row left repeats one.)

    Args:
        vectors: `[N, D]`.
        same_size: False where the ranks' N may differ in training too.

    Returns:
        `[of all ranks, D]`, long `[N]`.
    """
    own = torch.arange(len(vectors), device=vectors.device)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return vectors, own
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    if same_size and torch.is_grad_enabled():
        return _Gathered.apply(vectors), own + rank * len(vectors)
    counts = torch.zeros(ranks, dtype=torch.long, device=vectors.device)
    counts[rank] = len(vectors)
    distributed.all_reduce(counts)
    sizes = counts.tolist()
    parts = _Gathered.apply(F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))).chunk(ranks)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), own + sum(sizes[:rank])


class _Gathered(torch.autograd.Function):
    """All ranks' vectors, one rank after the other; a rank's gradient is the sum of what all ranks' losses say of it.

    Not `torch.distributed.nn.functional.all_gather`, which torch.compile does not trace.
    """

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor) -> torch.Tensor:
        gathered = vectors.new_empty(distributed.get_world_size() * len(vectors), *vectors.shape[1:])
        distributed.all_gather_into_tensor(gathered, vectors.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduced(gradient).chunk(distributed.get_world_size())[distributed.get_rank()]
